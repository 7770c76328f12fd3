/* mmap_fixed FILE PAGES [writable]: mmap(MAP_FIXED | MAP_POPULATE), a call a page. */
#include "loop.h"

int main(int argc, char **argv) {
    int writable = argc == 4 && strcmp(argv[3], "writable") == 0;
    CHECK(argc == 3 || writable, "mmap_fixed FILE PAGES [writable]");
    int prot = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    int fd = open(argv[1], writable ? O_RDWR : O_RDONLY), flags = MAP_SHARED | MAP_FIXED | MAP_POPULATE;
    CHECK(fd >= 0, argv[1]);
    int64_t limit = atol(argv[2]), *pages = malloc(limit * sizeof *pages), count;
    char *file = map_file(fd), *window = mmap(NULL, limit * PAGE, prot, MAP_SHARED, fd, 0);
    CHECK(window != MAP_FAILED, "mmap window");
    ready();
    while ((count = next_request(pages, limit)) >= 0) {
        int64_t begin = now_ns();
        for (int64_t i = 0; i < count; i++)
            CHECK(mmap(window + i * PAGE, PAGE, prot, flags, fd, pages[i] * PAGE) != MAP_FAILED, "mmap");
        answer(now_ns() - begin);
        verify(window, file, pages, count);
    }
    return EXIT_SUCCESS;
}
