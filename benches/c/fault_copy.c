/* fault_copy FILE PAGES: the bare loop behind a lazy fault, warm.
 *
 * The main thread touches absent pages in order; the handler thread polls,
 * reads the fault, preads the file page, installs it with UFFDIO_COPY.
 */
#include "loop.h"

#include <poll.h>
#include <pthread.h>

static int fd, uffd;
static int64_t *pages;
static char *window;

static void *handle_faults(void *unused) {
    static char buffer[PAGE] __attribute__((aligned(4096)));
    struct pollfd poll_uffd = {.fd = uffd, .events = POLLIN};
    for (;;) {
        struct uffd_msg fault;
        CHECK(poll(&poll_uffd, 1, -1) == 1, "poll");
        if (read(uffd, &fault, sizeof fault) != sizeof fault) continue;
        int64_t page = ((char *)(uintptr_t)fault.arg.pagefault.address - window) / PAGE;
        CHECK(pread(fd, buffer, PAGE, pages[page] * PAGE) == PAGE, "pread");
        struct uffdio_copy copy = {
            .dst = (uintptr_t)window + page * PAGE, .src = (uintptr_t)buffer, .len = PAGE};
        CHECK(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
    }
    return unused;
}

int main(int argc, char **argv) {
    CHECK(argc == 3, "fault_copy FILE PAGES");
    fd = open(argv[1], O_RDONLY);
    CHECK(fd >= 0, argv[1]);
    uffd = open_userfaultfd();
    int64_t limit = atol(argv[2]), count;
    pages = malloc(limit * sizeof *pages);
    char *file = map_file(fd);
    window = map_anonymous(limit * PAGE);
    register_range(uffd, window, limit * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    pthread_t handler;
    CHECK(pthread_create(&handler, NULL, handle_faults, NULL) == 0, "pthread_create");
    ready();
    while ((count = next_request(pages, limit)) >= 0) {
        CHECK(madvise(window, limit * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
        int64_t begin = now_ns();
        for (int64_t i = 0; i < count; i++) *(volatile char *)(window + i * PAGE);
        answer(now_ns() - begin);
        verify(window, file, pages, count);
    }
    return EXIT_SUCCESS;
}
