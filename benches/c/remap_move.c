/* remap_move FILE PAGES: the bare loop behind a paged remap, warm.
 *
 * Run by run: copy scattered pages from a populated map of the file into
 * staging, move the old pages of the window out to the spare run, move staging
 * in; the spare run is the next staging. Small pages, every frame recycled.
 */
#include "loop.h"

#define RUN 64L

static void move(int uffd, char *to, char *from, int64_t bytes) {
    struct uffdio_move move = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = bytes};
    CHECK(ioctl(uffd, UFFDIO_MOVE, &move) == 0, "UFFDIO_MOVE");
}

int main(int argc, char **argv) {
    CHECK(argc == 3, "remap_move FILE PAGES");
    int fd = open(argv[1], O_RDONLY), uffd = open_userfaultfd();
    CHECK(fd >= 0, argv[1]);
    int64_t limit = atol(argv[2]), *pages = malloc(limit * sizeof *pages), count;
    char *file = map_file(fd), *window = map_anonymous(limit * PAGE);
    char *staging = map_anonymous(RUN * PAGE), *spare = map_anonymous(RUN * PAGE);
    memset(window, 1, limit * PAGE);
    memset(staging, 1, RUN * PAGE);
    register_range(uffd, window, limit * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    register_range(uffd, staging, RUN * PAGE, UFFDIO_REGISTER_MODE_WP);
    register_range(uffd, spare, RUN * PAGE, UFFDIO_REGISTER_MODE_WP);
    ready();
    while ((count = next_request(pages, limit)) >= 0) {
        int64_t begin = now_ns();
        for (int64_t at = 0; at < count; at += RUN) {
            int64_t run = count - at < RUN ? count - at : RUN;
            for (int64_t i = 0; i < run; i++)
                memcpy(staging + i * PAGE, file + pages[at + i] * PAGE, PAGE);
            move(uffd, spare, window + at * PAGE, run * PAGE);
            move(uffd, window + at * PAGE, staging, run * PAGE);
            if (run < RUN) /* the rest of the run keeps its frames for the next round */
                move(uffd, spare + run * PAGE, staging + run * PAGE, (RUN - run) * PAGE);
            char *full = spare;
            spare = staging;
            staging = full;
        }
        answer(now_ns() - begin);
        verify(window, file, pages, count);
    }
    return EXIT_SUCCESS;
}
