/* fault_copy FILE PAGES [linear]: the bare loop behind a lazy fault, warm.
 *
 * The main thread touches absent pages in order; the handler thread polls,
 * reads the fault, preads the file page, installs it with UFFDIO_COPY.
 *
 * With "linear" each page of the window shows the file page of the same number,
 * and a request says in which order to touch them.
 */
#include "loop.h"

#include <poll.h>
#include <pthread.h>

static int fd, uffd, linear;
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
        int64_t file_page = linear ? page : pages[page];
        CHECK(pread(fd, buffer, PAGE, file_page * PAGE) == PAGE, "pread");
        struct uffdio_copy copy = {
            .dst = (uintptr_t)window + page * PAGE, .src = (uintptr_t)buffer, .len = PAGE};
        CHECK(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
    }
    return unused;
}

int main(int argc, char **argv) {
    linear = argc == 4 && strcmp(argv[3], "linear") == 0;
    CHECK(argc == 3 || linear, "fault_copy FILE PAGES [linear]");
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
        for (int64_t i = 0; i < count; i++)
            *(volatile char *)(window + (linear ? pages[i] : i) * PAGE);
        answer(now_ns() - begin);
        if (!linear) verify(window, file, pages, count);
        for (int64_t i = 0; linear && i < count; i++)
            CHECK(memcmp(window + pages[i] * PAGE, file + pages[i] * PAGE, PAGE) == 0, "a wrong page");
    }
    return EXIT_SUCCESS;
}
