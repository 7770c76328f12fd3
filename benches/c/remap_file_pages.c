/* remap_file_pages FILE PAGES [writable]: remap_file_pages(2), a call a page; it populates by itself.
 *
 * FILE must be writable: a mapping that could never be written does not count
 * as shared here, and the kernel answers EINVAL.
 */
#include "loop.h"

int main(int argc, char **argv) {
    int writable = argc == 4 && strcmp(argv[3], "writable") == 0;
    CHECK(argc == 3 || writable, "remap_file_pages FILE PAGES [writable]");
    int prot = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    int fd = open(argv[1], O_RDWR);
    CHECK(fd >= 0, argv[1]);
    int64_t limit = atol(argv[2]), *pages = malloc(limit * sizeof *pages), count;
    char *file = map_file(fd), *window = mmap(NULL, limit * PAGE, prot, MAP_SHARED, fd, 0);
    CHECK(window != MAP_FAILED, "mmap window");
    ready();
    while ((count = next_request(pages, limit)) >= 0) {
        int64_t begin = now_ns();
        for (int64_t i = 0; i < count; i++)
            CHECK(remap_file_pages(window + i * PAGE, PAGE, 0, pages[i], 0) == 0, "remap_file_pages");
        answer(now_ns() - begin);
        verify(window, file, pages, count);
    }
    return EXIT_SUCCESS;
}
