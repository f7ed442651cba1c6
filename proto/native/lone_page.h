/*
 * The commonest exchange as bytes: a request for one page, and the answer that brings it with data and nothing else.
 *
 * Nearly every fault is this. Both messages are then known but for a few numbers, so they are made and compared as
 * bytes: the bytes that the generated classes and farfault.codec write, which tests hold them against. What is not to
 * the byte as expected is no error, but somebody else's: the general way, in Python, which knows all messages.
 *
 * A frame is a message of pages.proto behind its length, a 32-bit little-endian number (LaneHello there).
 */
#ifndef FARFAULT_LONE_PAGE_H
#define FARFAULT_LONE_PAGE_H

#include <stddef.h>
#include <stdint.h>

#define LENGTH_BYTES 4
#define REQUEST_FRAME_MAX 64  /* of a request for one page */
#define ANSWER_SLACK_MAX 128  /* an answer is longer than its page by at most this much */
#define LONE_BYTES_MAX 65536  /* a larger page takes so long that it does not matter how its answer is made */

/* A page that is asked for. */
struct lone_request {
    uint64_t id;       /* above 0 */
    uint64_t priority; /* farfault.v1.Priority */
    uint64_t region;
    uint64_t page; /* within its region */
};

/* A verified answer, within somebody's bytes. */
struct lone_answer {
    size_t frame_bytes;
    size_t data_at;
    uint64_t queue_us; /* the server's own measure of its two stages */
    uint64_t read_us;
};

/* Writes the frame of a request. Returns its length, at most REQUEST_FRAME_MAX. */
size_t lone_request_write(uint8_t *frame, const struct lone_request *request);

/* Reads a request without its length. Returns 0 unless it is for one page and written as lone_request_write does. */
int lone_request_read(const uint8_t *message, size_t length, struct lone_request *request);

/*
 * Makes a frame of the page that lies ANSWER_SLACK_MAX into `buffer`: writes what precedes and follows it around it.
 * Returns where the frame begins within the buffer, and its length in `frame_bytes`.
 */
size_t lone_answer_write(uint8_t *buffer, size_t page_bytes, const struct lone_request *request, uint64_t generation,
                         uint64_t read_us, size_t *frame_bytes);

/*
 * Reads a frame that should be the answer to `request`. Returns 0 unless all of it is there, is to the byte what is
 * expected, and has the checksum that it says.
 */
int lone_answer_read(const uint8_t *bytes, size_t length, const struct lone_request *request, size_t page_bytes,
                     uint64_t generation, struct lone_answer *answer);

/* The id of the first request that an answer says is done, where its frame begins like an answer; 0: it does not. */
uint64_t lone_answer_id(const uint8_t *bytes, size_t length);

#endif
