/* take_rows LIST ROWS MODE:ROW_BYTES:OFFSET:SHARD_ROWS: rows of fixed size out of many files.
 *
 * LIST names the files, a line each; all have SHARD_ROWS rows of ROW_BYTES from byte OFFSET on.
 * A request is a list of rows, numbered through all files. MODE is one of
 *   direct    io_uring, O_DIRECT, blocks of the device's alignment, each read once
 *   buffered  io_uring through the page cache, a request a row, straight to its place
 *   advised   posix_fadvise a row, then pread a row
 *   threads   eight threads of preadv with O_DIRECT, a row each (rows of whole blocks)
 * The rings have 64 requests in flight, and are entered after every fourth that is queued until
 * they are full: a device that waits for the last of 64 idles as long as the caller prepares them.
 */
#include "loop.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <sys/uio.h>

#define DEPTH 64
#define EARLY 4
#define THREADS 8
#define MAX_FILES 20000

static int fds[MAX_FILES], direct_fds[MAX_FILES];
static long files, row_bytes, first_offset, shard_rows, block;
static int64_t *rows;
static char *out;

struct wanted {
    long shard, offset, position;
};
static struct wanted *wanted;

static int by_place(const void *a, const void *b) {
    const struct wanted *x = a, *y = b;
    if (x->shard != y->shard) return x->shard < y->shard ? -1 : 1;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* A ring, by the system calls themselves. */
static struct {
    int fd;
    unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    unsigned queued;
} ring;

static void set_up_ring(void) {
    struct io_uring_params p = {0};
    ring.fd = syscall(SYS_io_uring_setup, DEPTH, &p);
    CHECK(ring.fd >= 0, "io_uring_setup");
    size_t sq_bytes = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    size_t cq_bytes = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    size_t bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    char *m = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQ_RING);
    CHECK(m != MAP_FAILED, "mmap ring");
    ring.sqes = mmap(NULL, p.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQES);
    CHECK(ring.sqes != MAP_FAILED, "mmap entries");
    ring.sq_tail = (unsigned *)(m + p.sq_off.tail);
    ring.sq_mask = (unsigned *)(m + p.sq_off.ring_mask);
    ring.sq_array = (unsigned *)(m + p.sq_off.array);
    ring.cq_head = (unsigned *)(m + p.cq_off.head);
    ring.cq_tail = (unsigned *)(m + p.cq_off.tail);
    ring.cq_mask = (unsigned *)(m + p.cq_off.ring_mask);
    ring.cqes = (struct io_uring_cqe *)(m + p.cq_off.cqes);
}

static void queue_read(int fd, void *into, unsigned len, long offset, uint64_t slot) {
    unsigned tail = *ring.sq_tail, at = tail & *ring.sq_mask;
    ring.sqes[at] = (struct io_uring_sqe){.opcode = IORING_OP_READ, .fd = fd, .off = offset,
                                          .addr = (uintptr_t)into, .len = len, .user_data = slot};
    ring.sq_array[at] = at;
    __atomic_store_n(ring.sq_tail, tail + 1, __ATOMIC_RELEASE);
    ring.queued++;
}

static void enter(unsigned want) {
    long done = syscall(SYS_io_uring_enter, ring.fd, ring.queued, want, want ? IORING_ENTER_GETEVENTS : 0, NULL, 0);
    CHECK(done == ring.queued, "io_uring_enter");
    ring.queued = 0;
}

/* A read in flight: blocks of a file, and the rows that are in them. */
static struct {
    long start, first, count;
} reads[DEPTH];
static char *blocks[DEPTH];

static void end_read(unsigned slot, int direct) {
    if (!direct) return;
    for (long i = reads[slot].first; i < reads[slot].first + reads[slot].count; i++)
        memcpy(out + wanted[i].position * row_bytes, blocks[slot] + (wanted[i].offset - reads[slot].start), row_bytes);
}

/* Ends what has ended; the number of that. */
static long reap(unsigned *free_slots, unsigned *free_count, int direct) {
    unsigned head = *ring.cq_head, tail = __atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE);
    long ended = tail - head;
    for (; head != tail; head++) {
        struct io_uring_cqe *cqe = &ring.cqes[head & *ring.cq_mask];
        if (cqe->res < row_bytes) {
            fprintf(stderr, "a read ended with %d\n", cqe->res);
            exit(EXIT_FAILURE);
        }
        end_read(cqe->user_data, direct);
        free_slots[(*free_count)++] = cqe->user_data;
    }
    __atomic_store_n(ring.cq_head, head, __ATOMIC_RELEASE);
    return ended;
}

static void by_ring(long count, int direct, long most_bytes) {
    unsigned free_slots[DEPTH], free_count = 0;
    for (unsigned i = 0; i < DEPTH; i++) free_slots[free_count++] = i;
    long next = 0, in_flight = 0;
    while (next < count || in_flight > 0) {
        while (next < count && free_count > 0) {
            unsigned slot = free_slots[--free_count];
            struct wanted *w = &wanted[next];
            if (direct) {
                long start = w->offset / block * block, end = start;
                reads[slot].start = start;
                reads[slot].first = next;
                do {
                    end = (wanted[next].offset + row_bytes + block - 1) / block * block;
                    next++;
                } while (next < count && wanted[next].shard == w->shard && wanted[next].offset <= end &&
                         (wanted[next].offset + row_bytes + block - 1) / block * block - start <= most_bytes);
                reads[slot].count = next - reads[slot].first;
                queue_read(direct_fds[w->shard], blocks[slot], end - start, start, slot);
            } else {
                queue_read(fds[w->shard], out + w->position * row_bytes, row_bytes, w->offset, slot);
                next++;
            }
            in_flight++;
            if (ring.queued >= EARLY) enter(0);
        }
        if (ring.queued) enter(0);
        long ended = reap(free_slots, &free_count, direct);
        if (ended == 0 && in_flight > 0) {
            enter(next < count && in_flight > 8 ? 4 : 1);
            ended = reap(free_slots, &free_count, direct);
        }
        in_flight -= ended;
    }
}

static void by_advice(long count) {
    for (long i = 0; i < count; i++)
        posix_fadvise(fds[wanted[i].shard], wanted[i].offset, row_bytes, POSIX_FADV_WILLNEED);
    for (long i = 0; i < count; i++)
        CHECK(pread(fds[wanted[i].shard], out + wanted[i].position * row_bytes, row_bytes, wanted[i].offset) == row_bytes,
              "pread");
}

static long next_row, row_limit;

static void *read_rows(void *unused) {
    char *buffer;
    long most = (row_bytes + 2 * block + 4095) / 4096 * 4096;
    CHECK(posix_memalign((void **)&buffer, 4096, most) == 0, "memory");
    for (;;) {
        long i = __atomic_fetch_add(&next_row, 1, __ATOMIC_RELAXED);
        if (i >= row_limit) break;
        long start = wanted[i].offset / block * block;
        long end = (wanted[i].offset + row_bytes + block - 1) / block * block;
        char *place = out + wanted[i].position * row_bytes;
        int straight = start == wanted[i].offset && end - start == row_bytes && (uintptr_t)place % block == 0;
        struct iovec part = {straight ? place : buffer, end - start};
        CHECK(preadv(direct_fds[wanted[i].shard], &part, 1, start) >= wanted[i].offset - start + row_bytes, "preadv");
        if (!straight) memcpy(place, buffer + (wanted[i].offset - start), row_bytes);
    }
    free(buffer);
    return unused;
}

static void by_threads(long count) {
    pthread_t threads[THREADS];
    next_row = 0, row_limit = count;
    for (int i = 0; i < THREADS; i++) CHECK(pthread_create(&threads[i], NULL, read_rows, NULL) == 0, "thread");
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
}

/* The alignment of direct reads (Linux 6.1), or what every device takes. */
static long alignment(int fd) {
#ifdef STATX_DIOALIGN
    struct statx facts;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &facts) == 0 && facts.stx_mask & STATX_DIOALIGN &&
        facts.stx_dio_offset_align)
        return facts.stx_dio_offset_align;
#else
    (void)fd;
#endif
    return 512;
}

/* Some rows again, by plain reads. */
static void verify_rows(long count) {
    char *row = malloc(row_bytes);
    for (long i = 0; i < count; i += 1 + count / 16) {
        long shard = rows[i] / shard_rows, offset = first_offset + rows[i] % shard_rows * row_bytes;
        CHECK(pread(fds[shard], row, row_bytes, offset) == row_bytes, "pread");
        if (memcmp(row, out + i * row_bytes, row_bytes) != 0) {
            fprintf(stderr, "row %ld is not what the file has\n", (long)rows[i]);
            exit(EXIT_FAILURE);
        }
    }
    free(row);
}

int main(int argc, char **argv) {
    char mode[16];
    CHECK(argc == 4 && sscanf(argv[3], "%15[a-z]:%ld:%ld:%ld", mode, &row_bytes, &first_offset, &shard_rows) == 4,
          "take_rows LIST ROWS MODE:ROW_BYTES:OFFSET:SHARD_ROWS");
    int direct = !strcmp(mode, "direct"), threads = !strcmp(mode, "threads"), advised = !strcmp(mode, "advised");
    int buffered = !strcmp(mode, "buffered");
    errno = EINVAL;
    CHECK(direct || threads || advised || buffered, mode);
    FILE *list = fopen(argv[1], "r");
    CHECK(list, argv[1]);
    char path[4096];
    while (fgets(path, sizeof path, list) && files < MAX_FILES) {
        path[strcspn(path, "\n")] = 0;
        CHECK((fds[files] = open(path, O_RDONLY)) >= 0, path);
        posix_fadvise(fds[files], 0, 0, POSIX_FADV_RANDOM); /* no neighbours are read */
        if (direct || threads) CHECK((direct_fds[files] = open(path, O_RDONLY | O_DIRECT)) >= 0, path);
        files++;
    }
    long limit = atol(argv[2]), count;
    block = alignment(fds[0]);
    rows = malloc(limit * sizeof *rows);
    wanted = malloc(limit * sizeof *wanted);
    CHECK(posix_memalign((void **)&out, 4096, limit * row_bytes) == 0, "memory");
    memset(out, 1, limit * row_bytes);
    long most_bytes = (row_bytes + 8192) / 4096 * 4096 + 4096;
    for (int i = 0; i < DEPTH; i++) {
        CHECK(posix_memalign((void **)&blocks[i], 4096, most_bytes) == 0, "memory");
        memset(blocks[i], 1, most_bytes);
    }
    if (direct || buffered) set_up_ring();
    ready();
    while ((count = next_request(rows, limit)) >= 0) {
        int64_t begin = now_ns();
        for (long i = 0; i < count; i++) {
            long shard = rows[i] / shard_rows;
            wanted[i] = (struct wanted){shard, first_offset + rows[i] % shard_rows * row_bytes, i};
        }
        qsort(wanted, count, sizeof *wanted, by_place);
        if (threads) by_threads(count);
        else if (advised) by_advice(count);
        else by_ring(count, direct, most_bytes);
        answer(now_ns() - begin);
        verify_rows(count);
    }
    return EXIT_SUCCESS;
}
