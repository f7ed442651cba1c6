"""`farfault report`: the record that a receiver keeps of a move, and the page that shows it."""
