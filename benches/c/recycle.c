/* recycle: a cache whose frames go round, beside one that gives them back.
 *
 * A window of which a quarter is present. Again and again the pages that came
 * first leave, a batch at once, and as many others come, one by one as faults
 * bring them. "fresh": one process_madvise(MADV_DONTNEED) a batch, UFFDIO_COPY
 * a page. "recycled": UFFDIO_MOVE takes a page out, memcpy fills its frame,
 * UFFDIO_MOVE puts it in. Both in turn; prints microseconds a page (decision 012).
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

static void copy(int uffd, char *to, const char *from) {
    struct uffdio_copy copy = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = PAGE};
    CHECK(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
}

static void move(int uffd, char *to, char *from) {
    struct uffdio_move move = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = PAGE};
    CHECK(ioctl(uffd, UFFDIO_MOVE, &move) == 0, "UFFDIO_MOVE");
}

static void drop(int process, char *const *pages) {
    struct iovec ranges[BATCH];
    for (long i = 0; i < BATCH; i++) ranges[i] = (struct iovec){pages[i], PAGE};
    if (syscall(SYS_process_madvise, process, ranges, BATCH, MADV_DONTNEED, 0) == BATCH * PAGE) return;
    for (long i = 0; i < BATCH; i++) /* before Linux 6.13 only one by one */
        CHECK(madvise(pages[i], PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
}

int main(void) {
    int uffd = open_userfaultfd(), process = syscall(SYS_pidfd_open, getpid(), 0);
    CHECK(process >= 0, "pidfd_open");
    char *window = map_anonymous(PAGES * PAGE), *frames = map_anonymous(BATCH * PAGE);
    char *source = map_anonymous(SOURCE * PAGE);
    memset(source, 1, SOURCE * PAGE);
    register_range(uffd, window, PAGES * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    register_range(uffd, frames, BATCH * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    char **order = malloc(PAGES * sizeof *order); /* the present ones first; a ring */
    for (long i = 0; i < PAGES; i++) order[i] = window + i * PAGE;
    for (long i = PAGES - 1; i > 0; i--) {
        long j = random() % (i + 1);
        char *page = order[i];
        order[i] = order[j], order[j] = page;
    }
    for (long i = 0; i < PRESENT; i++) copy(uffd, order[i], source);
    int64_t leaving[2] = {0}, coming[2] = {0};
    for (long round = 0; round < ROUNDS; round++) {
        int recycled = round % 2;
        char **out = order + round * BATCH % PAGES, **in = order + (round * BATCH + PRESENT) % PAGES;
        int64_t begin = now_ns();
        if (!recycled) drop(process, out);
        for (long i = 0; recycled && i < BATCH; i++) move(uffd, frames + i * PAGE, out[i]);
        int64_t between = now_ns();
        for (long i = 0; i < BATCH; i++) {
            char *content = source + (round * BATCH + i) % SOURCE * PAGE;
            if (recycled) {
                memcpy(frames + i * PAGE, content, PAGE);
                move(uffd, in[i], frames + i * PAGE);
            } else {
                copy(uffd, in[i], content);
            }
        }
        int64_t end = now_ns();
        for (long i = 0; i < BATCH; i++) CHECK(in[i][PAGE - 1] == 1, "a page that came");
        if (round < WARM_UP) continue;
        leaving[recycled] += between - begin;
        coming[recycled] += end - between;
    }
    for (int recycled = 0; recycled < 2; recycled++) {
        double pages = (ROUNDS - WARM_UP) / 2 * BATCH * 1e3;
        printf("%s frames: leave %.2f + come %.2f = %.2f us a page\n", recycled ? "recycled" : "fresh",
               leaving[recycled] / pages, coming[recycled] / pages, (leaving[recycled] + coming[recycled]) / pages);
    }
    return EXIT_SUCCESS;
}
