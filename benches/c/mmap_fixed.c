/* mmap_fixed FILE PAGES: mmap(MAP_FIXED | MAP_POPULATE), a call a page. */
#include "loop.h"

int main(int argc, char **argv) {
    CHECK(argc == 3, "mmap_fixed FILE PAGES");
    int fd = open(argv[1], O_RDONLY), flags = MAP_SHARED | MAP_FIXED | MAP_POPULATE;
    CHECK(fd >= 0, argv[1]);
    int64_t limit = atol(argv[2]), *pages = malloc(limit * sizeof *pages), count;
    char *file = map_file(fd), *window = mmap(NULL, limit * PAGE, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(window != MAP_FAILED, "mmap window");
    ready();
    while ((count = next_request(pages, limit)) >= 0) {
        int64_t begin = now_ns();
        for (int64_t i = 0; i < count; i++)
            CHECK(mmap(window + i * PAGE, PAGE, PROT_READ, flags, fd, pages[i] * PAGE) != MAP_FAILED, "mmap");
        answer(now_ns() - begin);
        verify(window, file, pages, count);
    }
    return EXIT_SUCCESS;
}
