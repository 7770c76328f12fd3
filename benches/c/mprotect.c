/* mprotect FILE PAGES: mprotect(2), a call a page; a request names the window pages.
 *
 * Each request takes the access away (PROT_NONE) and gives it back (PROT_READ):
 * two numbers in the answer. The window is a populated map of the file.
 */
#include "loop.h"

static int64_t protect(char *window, const int64_t *pages, int64_t count, int prot) {
    int64_t begin = now_ns();
    for (int64_t i = 0; i < count; i++)
        CHECK(mprotect(window + pages[i] * PAGE, PAGE, prot) == 0, "mprotect");
    return now_ns() - begin;
}

int main(int argc, char **argv) {
    CHECK(argc == 3, "mprotect FILE PAGES");
    int fd = open(argv[1], O_RDONLY);
    CHECK(fd >= 0, argv[1]);
    int64_t limit = atol(argv[2]), *pages = malloc(limit * sizeof *pages), count;
    char *window = mmap(NULL, limit * PAGE, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    CHECK(window != MAP_FAILED, "mmap window");
    ready();
    while ((count = next_request(pages, limit)) >= 0) {
        int64_t none = protect(window, pages, count, PROT_NONE);
        int64_t read = protect(window, pages, count, PROT_READ);
        printf("%ld %ld\n", none, read);
        fflush(stdout);
    }
    return EXIT_SUCCESS;
}
