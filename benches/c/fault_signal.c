/* fault_signal FILE PAGES linear: the bare loop behind a lazy fault by signal, warm.
 *
 * Each page of the window shows the file page of the same number, and a request says in
 * which order to touch them. The thread that touches an absent page gets SIGBUS
 * (UFFD_FEATURE_SIGBUS); its handler preads the file page and installs it with UFFDIO_COPY.
 */
#include "loop.h"

#include <signal.h>

static int fd, uffd;
static char *window;
static char buffer[PAGE] __attribute__((aligned(4096)));

static void handle_fault(int signal, siginfo_t *info, void *unused) {
    int64_t page = ((char *)info->si_addr - window) / PAGE;
    struct uffdio_copy copy = {
        .dst = (uintptr_t)window + page * PAGE, .src = (uintptr_t)buffer, .len = PAGE};
    if (pread(fd, buffer, PAGE, page * PAGE) != PAGE || ioctl(uffd, UFFDIO_COPY, &copy) != 0)
        _exit(EXIT_FAILURE);
    (void)signal, (void)unused;
}

static int open_signalling_userfaultfd(void) {
    int descriptor = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    CHECK(descriptor >= 0, "userfaultfd");
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_SIGBUS};
    CHECK(ioctl(descriptor, UFFDIO_API, &api) == 0, "UFFDIO_API");
    return descriptor;
}

int main(int argc, char **argv) {
    CHECK(argc == 4 && strcmp(argv[3], "linear") == 0, "fault_signal FILE PAGES linear");
    fd = open(argv[1], O_RDONLY);
    CHECK(fd >= 0, argv[1]);
    uffd = open_signalling_userfaultfd();
    struct sigaction action = {.sa_sigaction = handle_fault, .sa_flags = SA_SIGINFO};
    CHECK(sigaction(SIGBUS, &action, NULL) == 0, "sigaction");
    int64_t limit = atol(argv[2]), count, *pages = malloc(limit * sizeof *pages);
    char *file = map_file(fd);
    window = map_anonymous(limit * PAGE);
    register_range(uffd, window, limit * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    ready();
    while ((count = next_request(pages, limit)) >= 0) {
        CHECK(madvise(window, limit * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
        int64_t begin = now_ns();
        for (int64_t i = 0; i < count; i++) *(volatile char *)(window + pages[i] * PAGE);
        answer(now_ns() - begin);
        for (int64_t i = 0; i < count; i++)
            CHECK(memcmp(window + pages[i] * PAGE, file + pages[i] * PAGE, PAGE) == 0, "a wrong page");
    }
    return EXIT_SUCCESS;
}
