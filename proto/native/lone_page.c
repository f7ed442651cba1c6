/* Messages for one page; see lone_page.h. Field numbers are pages.proto's, the checksum is farfault.checksum's. */
#define XXH_INLINE_ALL
#include "lone_page.h"

#include <string.h>
#include <xxhash.h>

enum {
    REQUEST_ID_TAG = 0x08, /* FetchRequest */
    REQUEST_PRIORITY_TAG = 0x10,
    REQUEST_RANGE_TAG = 0x1a,
    DONE_TAG = 0x0a, /* PageBatch */
    EXTENT_TAG = 0x12,
    CHECKSUM_TAG = 0x19,
    DATA_TAG = 0x22,
    GENERATION_TAG = 0x28,
    QUEUE_TAG = 0x30,
    READ_TAG = 0x38,
    PLACE_REGION_TAG = 0x08, /* PageRange and Extent alike */
    PLACE_PAGE_TAG = 0x10,
    PLACE_COUNT_TAG = 0x18,
};
enum { VARINT_MAX = 10, CHECKSUM_BYTES = 8, EXTENT_KIND_DATA = 0 };

static size_t put_varint(uint8_t *out, uint64_t value)
{
    size_t length = 0;
    for (; value > 0x7f; value >>= 7)
        out[length++] = (uint8_t)(value | 0x80);
    out[length++] = (uint8_t)value;
    return length;
}

/* A field that is left out where it is 0, as proto3 has it. */
static size_t put_field(uint8_t *out, uint8_t tag, uint64_t value)
{
    if (!value)
        return 0;
    out[0] = tag;
    return 1 + put_varint(out + 1, value);
}

/* Returns the bytes that a number takes; 0: it is cut short, or longer than need be. */
static size_t get_varint(const uint8_t *bytes, size_t length, uint64_t *value)
{
    *value = 0;
    for (size_t index = 0; index < length && index < VARINT_MAX; index++) {
        *value |= (uint64_t)(bytes[index] & 0x7f) << (7 * index);
        if (bytes[index] < 0x80)
            return index && !bytes[index] ? 0 : index + 1;
    }
    return 0;
}

static size_t get_field(const uint8_t *bytes, size_t length, uint8_t tag, uint64_t *value)
{
    *value = 0;
    if (!length || bytes[0] != tag)
        return 0;
    size_t used = get_varint(bytes + 1, length - 1, value);
    return used ? 1 + used : 0;
}

static void put_length(uint8_t *out, size_t length)
{
    for (int index = 0; index < LENGTH_BYTES; index++)
        out[index] = (uint8_t)(length >> (8 * index));
}

static size_t get_length(const uint8_t *bytes)
{
    return (size_t)bytes[0] | (size_t)bytes[1] << 8 | (size_t)bytes[2] << 16 | (size_t)bytes[3] << 24;
}

/* Where one page is: a PageRange, or an Extent with data, behind its length. */
static size_t put_place(uint8_t *out, const struct lone_request *request)
{
    size_t length = 1;
    length += put_field(out + length, PLACE_REGION_TAG, request->region);
    length += put_field(out + length, PLACE_PAGE_TAG, request->page);
    length += put_field(out + length, PLACE_COUNT_TAG, 1);
    out[0] = (uint8_t)(length - 1);
    return length;
}

size_t lone_request_write(uint8_t *frame, const struct lone_request *request)
{
    size_t length = LENGTH_BYTES;
    length += put_field(frame + length, REQUEST_ID_TAG, request->id);
    length += put_field(frame + length, REQUEST_PRIORITY_TAG, request->priority);
    frame[length++] = REQUEST_RANGE_TAG;
    length += put_place(frame + length, request);
    put_length(frame, length - LENGTH_BYTES);
    return length;
}

int lone_request_read(const uint8_t *message, size_t length, struct lone_request *request)
{
    size_t at = get_field(message, length, REQUEST_ID_TAG, &request->id), used;
    if (!at || !(used = get_field(message + at, length - at, REQUEST_PRIORITY_TAG, &request->priority)))
        return 0;
    at += used;
    if (length - at < 2 || message[at] != REQUEST_RANGE_TAG || message[at + 1] != length - at - 2)
        return 0;
    at += 2;
    at += get_field(message + at, length - at, PLACE_REGION_TAG, &request->region);
    at += get_field(message + at, length - at, PLACE_PAGE_TAG, &request->page);
    return request->id && length - at == 2 && message[at] == PLACE_COUNT_TAG && message[at + 1] == 1;
}

/* What precedes the checksum of an answer. */
static size_t put_front(uint8_t *out, const struct lone_request *request)
{
    size_t length = 2 + put_varint(out + 2, request->id);
    out[0] = DONE_TAG;
    out[1] = (uint8_t)(length - 2);
    out[length++] = EXTENT_TAG;
    return length + put_place(out + length, request);
}

static uint64_t checksum(const uint8_t *page, size_t page_bytes, const struct lone_request *request,
                         uint64_t generation)
{
    const uint64_t places[] = {generation, 1, request->id, request->region, request->page, 1, EXTENT_KIND_DATA};
    uint8_t packed[sizeof(places)];
    for (size_t index = 0; index < sizeof(packed); index++)
        packed[index] = (uint8_t)(places[index / 8] >> (8 * (index % 8)));
    return XXH3_64bits_withSeed(page, page_bytes, XXH3_64bits(packed, sizeof(packed)));
}

size_t lone_answer_write(uint8_t *buffer, size_t page_bytes, const struct lone_request *request, uint64_t generation,
                         uint64_t read_us, size_t *frame_bytes)
{
    uint8_t head[ANSWER_SLACK_MAX], *page = buffer + ANSWER_SLACK_MAX;
    uint64_t sum = checksum(page, page_bytes, request, generation);
    size_t head_bytes = LENGTH_BYTES, tail_bytes = 0;
    head_bytes += put_front(head + head_bytes, request);
    if (sum) {
        head[head_bytes++] = CHECKSUM_TAG;
        for (int index = 0; index < CHECKSUM_BYTES; index++)
            head[head_bytes++] = (uint8_t)(sum >> (8 * index));
    }
    head_bytes += put_field(head + head_bytes, DATA_TAG, page_bytes);
    tail_bytes += put_field(page + page_bytes + tail_bytes, GENERATION_TAG, generation);
    tail_bytes += put_field(page + page_bytes + tail_bytes, READ_TAG, read_us);
    *frame_bytes = head_bytes + page_bytes + tail_bytes;
    put_length(head, *frame_bytes - LENGTH_BYTES);
    memcpy(page - head_bytes, head, head_bytes);
    return ANSWER_SLACK_MAX - head_bytes;
}

uint64_t lone_answer_id(const uint8_t *bytes, size_t length)
{
    uint64_t id;
    if (length < LENGTH_BYTES + 2 || bytes[LENGTH_BYTES] != DONE_TAG)
        return 0;
    size_t done_bytes = bytes[LENGTH_BYTES + 1];
    if (length < LENGTH_BYTES + 2 + done_bytes || get_varint(bytes + LENGTH_BYTES + 2, done_bytes, &id) != done_bytes)
        return 0;
    return id;
}

int lone_answer_read(const uint8_t *bytes, size_t length, const struct lone_request *request, size_t page_bytes,
                     uint64_t generation, struct lone_answer *answer)
{
    uint8_t expected[ANSWER_SLACK_MAX];
    if (length < LENGTH_BYTES || get_length(bytes) > length - LENGTH_BYTES)
        return 0;
    size_t end = LENGTH_BYTES + get_length(bytes), at = LENGTH_BYTES;
    size_t front_bytes = put_front(expected, request);
    expected[front_bytes++] = CHECKSUM_TAG;
    if (end - at < front_bytes + CHECKSUM_BYTES || memcmp(bytes + at, expected, front_bytes))
        return 0;
    at += front_bytes;
    uint64_t sum = 0;
    for (int index = 0; index < CHECKSUM_BYTES; index++)
        sum |= (uint64_t)bytes[at++] << (8 * index);
    size_t tag_bytes = put_field(expected, DATA_TAG, page_bytes);
    size_t tail_bytes = put_field(expected + tag_bytes, GENERATION_TAG, generation);
    if (end - at < tag_bytes + page_bytes + tail_bytes || memcmp(bytes + at, expected, tag_bytes))
        return 0;
    at += tag_bytes;
    const uint8_t *page = bytes + at;
    answer->data_at = at;
    answer->frame_bytes = end;
    at += page_bytes;
    if (memcmp(bytes + at, expected + tag_bytes, tail_bytes))
        return 0;
    at += tail_bytes;
    at += get_field(bytes + at, end - at, QUEUE_TAG, &answer->queue_us);
    at += get_field(bytes + at, end - at, READ_TAG, &answer->read_us);
    return at == end && sum == checksum(page, page_bytes, request, generation);
}
