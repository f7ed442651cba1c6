import math

from farfault_server.leases.hold import Hold


def test_nothing_is_held_for_ever_unless_somebody_says_how_long():
    hold = Hold()
    assert hold.left_s(0) == hold.left_s(1e12) == math.inf
    hold.renew(100, 0)
    assert hold.left_s(1e12) == math.inf


def test_silence_ends_it_and_a_sign_of_life_renews_it():
    hold = Hold()
    hold.renew(100, 5)
    assert [hold.left_s(now) for now in (100, 104, 105, 1e12)] == [5, 1, 0, 0]
    hold.renew(104, 5)
    assert hold.left_s(105) == 4


def test_the_last_word_counts():
    hold = Hold()
    hold.renew(100, 60)
    hold.renew(101, 1)
    assert hold.left_s(102) == 0
    hold.renew(103, 0)
    assert hold.left_s(1e12) == math.inf
