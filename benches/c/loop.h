/* What every loop here needs and none measures: the request protocol, the
 * clock, the file, a userfaultfd.
 *
 * A loop prints "ready", then answers requests until end of file. A request is
 * a native int64 count and that many int64 page numbers; the answer is a line
 * of nanoseconds. So whoever drives the loop can run its rounds in turn with
 * other rounds, over the same pages. Each loop checks what it made, after the
 * clock has stopped.
 */
#ifndef LOOP_H
#define LOOP_H

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096L

/* Linux 6.8; older headers lack it. */
#ifndef UFFDIO_MOVE
struct uffdio_move {
    __u64 dst, src, len, mode;
    __s64 move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif

#define CHECK(ok, what)            \
    do {                           \
        if (!(ok)) {               \
            perror(what);          \
            exit(EXIT_FAILURE);    \
        }                          \
    } while (0)

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* The next request's pages, at most `limit`; their number, or -1 at the end. */
static inline int64_t next_request(int64_t *pages, int64_t limit) {
    int64_t count;
    if (fread(&count, sizeof count, 1, stdin) != 1) return -1;
    CHECK(count <= limit && fread(pages, sizeof *pages, count, stdin) == (size_t)count, "request");
    return count;
}

static inline void ready(void) {
    puts("ready");
    fflush(stdout);
}

static inline void answer(int64_t ns) {
    printf("%ld\n", ns);
    fflush(stdout);
}

/* The file as a map that is present from end to end. */
static inline char *map_file(int fd) {
    struct stat st;
    CHECK(fstat(fd, &st) == 0, "fstat");
    char *map = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    CHECK(map != MAP_FAILED, "mmap file");
    return map;
}

/* Anonymous memory in small pages, absent. */
static inline char *map_anonymous(int64_t bytes) {
    char *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(map != MAP_FAILED, "mmap anonymous");
    CHECK(madvise(map, bytes, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
    return map;
}

static inline int open_userfaultfd(void) {
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    CHECK(fd >= 0, "userfaultfd");
    struct uffdio_api api = {.api = UFFD_API};
    CHECK(ioctl(fd, UFFDIO_API, &api) == 0, "UFFDIO_API");
    return fd;
}

static inline void register_range(int fd, char *start, int64_t bytes, uint64_t mode) {
    struct uffdio_register range = {.range = {(uintptr_t)start, bytes}, .mode = mode};
    CHECK(ioctl(fd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");
}

/* Window page i must begin as file page pages[i] does. */
static inline void verify(const char *window, const char *file, const int64_t *pages, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (memcmp(window + i * PAGE, file + pages[i] * PAGE, 16) != 0) {
            fprintf(stderr, "window page %ld does not show file page %ld\n", i, pages[i]);
            exit(EXIT_FAILURE);
        }
}

#endif
