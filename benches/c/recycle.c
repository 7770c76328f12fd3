/* recycle: a cache whose frames go round, beside one that gives them back.
 *
 * A window of which a quarter is present. Again and again the pages that came
 * first leave, a batch at once, and as many others come. "fresh":
 * MADV_DONTNEED, then UFFDIO_COPY. "recycled": UFFDIO_MOVE takes pages out,
 * memcpy fills their frames, UFFDIO_MOVE puts them in. Both in turn; once with
 * batches of scattered pages, which come one by one as random faults bring
 * them, once with runs of neighbours, which come together as a scan does.
 * Prints microseconds a page (decision 012).
 * Stands alone: cc -O2 benches/c/recycle.c -o recycle && ./recycle
 */
#include "loop.h"

#include <sys/uio.h>

#define PAGES (256 * 1024L)
#define PRESENT (PAGES / 4)
#define BATCH 64L
#define ROUNDS 4000L
#define WARM_UP 200L
#define SOURCE 16384L

static void copy(int uffd, char *to, const char *from, long pages) {
    struct uffdio_copy copy = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = pages * PAGE};
    CHECK(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
}

static void move(int uffd, char *to, char *from, long pages) {
    struct uffdio_move move = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = pages * PAGE};
    CHECK(ioctl(uffd, UFFDIO_MOVE, &move) == 0, "UFFDIO_MOVE");
}

/* Parts of a batch of `piece` pages each, which are neighbours. */
static void drop(int process, char *const *batch, long piece) {
    struct iovec ranges[BATCH];
    long count = BATCH / piece;
    for (long i = 0; i < count; i++) ranges[i] = (struct iovec){batch[i * piece], piece * PAGE};
    if (syscall(SYS_process_madvise, process, ranges, count, MADV_DONTNEED, 0) == BATCH * PAGE) return;
    for (long i = 0; i < count; i++) /* before Linux 6.13 only one by one */
        CHECK(madvise(ranges[i].iov_base, piece * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
}

/* The window's pages by parts of `piece`, these in random order. */
static char **shuffled(char *window, long piece) {
    char **order = malloc(PAGES * sizeof *order);
    long count = PAGES / piece, *parts = malloc(count * sizeof *parts);
    for (long i = 0; i < count; i++) parts[i] = i;
    for (long i = count - 1; i > 0; i--) {
        long j = random() % (i + 1), part = parts[i];
        parts[i] = parts[j], parts[j] = part;
    }
    for (long i = 0; i < PAGES; i++) order[i] = window + (parts[i / piece] * piece + i % piece) * PAGE;
    free(parts);
    return order;
}

static void measure(int uffd, int process, const char *source, long piece) {
    char *window = map_anonymous(PAGES * PAGE), *frames = map_anonymous(BATCH * PAGE);
    char *staging = map_anonymous(BATCH * PAGE);
    register_range(uffd, window, PAGES * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    register_range(uffd, frames, BATCH * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    char **order = shuffled(window, piece); /* the present ones first; a ring */
    for (long i = 0; i < PRESENT; i++) copy(uffd, order[i], source, 1);
    int64_t leaving[2] = {0}, coming[2] = {0};
    for (long round = 0; round < ROUNDS; round++) {
        int recycled = round % 2;
        char **out = order + round * BATCH % PAGES, **in = order + (round * BATCH + PRESENT) % PAGES;
        int64_t begin = now_ns();
        if (!recycled) drop(process, out, piece);
        for (long i = 0; recycled && i < BATCH; i += piece) move(uffd, frames + i * PAGE, out[i], piece);
        int64_t between = now_ns();
        for (long i = 0; i < BATCH; i += piece) {
            char *filled = (recycled ? frames : staging) + i * PAGE;
            memcpy(filled, source + (round * BATCH + i) % SOURCE * PAGE, piece * PAGE);
            if (recycled)
                move(uffd, in[i], filled, piece);
            else
                copy(uffd, in[i], filled, piece);
        }
        int64_t end = now_ns();
        for (long i = 0; i < BATCH; i++) CHECK(in[i][PAGE - 1] == 1, "a page that came");
        if (round < WARM_UP) continue;
        leaving[recycled] += between - begin;
        coming[recycled] += end - between;
    }
    for (int recycled = 0; recycled < 2; recycled++) {
        double pages = (ROUNDS - WARM_UP) / 2 * BATCH * 1e3;
        printf("%s, %s frames: leave %.2f + come %.2f = %.2f us a page\n", piece > 1 ? "runs" : "scattered",
               recycled ? "recycled" : "fresh", leaving[recycled] / pages, coming[recycled] / pages,
               (leaving[recycled] + coming[recycled]) / pages);
    }
    munmap(window, PAGES * PAGE);
}

int main(void) {
    int uffd = open_userfaultfd(), process = syscall(SYS_pidfd_open, getpid(), 0);
    CHECK(process >= 0, "pidfd_open");
    char *source = map_anonymous((SOURCE + BATCH) * PAGE);
    memset(source, 1, (SOURCE + BATCH) * PAGE);
    measure(uffd, process, source, 1);
    measure(uffd, process, source, BATCH);
    return EXIT_SUCCESS;
}
