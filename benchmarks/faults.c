/* Faults on demand, for a process that is started with this library in LD_PRELOAD.

   FAULTS_DIR    files below it are concerned
   FAULTS_EIO    while this file is there, reading, writing and syncing them fails with EIO:
                 every call, or as many in a hundred, by chance, as the file says
   FAULTS_CLOCK  a file that holds by how many seconds the wall clock is wrong

   Only the calls that Python, SQLite and Rust's standard library make are covered. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* How many calls in a hundred are to fail; 0 if the file is not there. */
static int chance(const char *flag) {
    int percent = 100;
    FILE *file = fopen(flag, "r");
    if (!file) return 0;
    if (fscanf(file, "%d", &percent) != 1) percent = 100;
    fclose(file);
    return percent;
}

static int is_unlucky(int percent) {
    static __thread unsigned seed;
    struct timespec now;
    if (percent >= 100) return 1;
    if (!seed) {
        /* Not by our own clock_gettime, which reads files. */
        timespec_get(&now, TIME_UTC);
        seed = (unsigned)now.tv_nsec | 1;
    }
    return rand_r(&seed) % 100 < percent;
}

static int concerns(int fd) {
    static __thread int busy;
    const char *flag = getenv("FAULTS_EIO"), *folder = getenv("FAULTS_DIR");
    char link[64], path[4096];
    ssize_t length;
    if (busy || !flag || !folder) return 0;
    busy = 1;
    int kept = errno, found = 0, percent = chance(flag);
    if (percent) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        length = readlink(link, path, sizeof path - 1);
        if (length > 0) {
            path[length] = 0;
            found = strncmp(path, folder, strlen(folder)) == 0 && is_unlucky(percent);
        }
    }
    errno = kept;
    busy = 0;
    return found;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define FAILS(fd) if (concerns(fd)) { errno = EIO; return -1; }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write); FAILS(fd) return real(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite); FAILS(fd) return real(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64); FAILS(fd) return real(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev); FAILS(fd) return real(fd, parts, count);
}
ssize_t read(int fd, void *data, size_t size) {
    REAL(read); FAILS(fd) return real(fd, data, size);
}
ssize_t pread(int fd, void *data, size_t size, off_t at) {
    REAL(pread); FAILS(fd) return real(fd, data, size, at);
}
ssize_t pread64(int fd, void *data, size_t size, off64_t at) {
    REAL(pread64); FAILS(fd) return real(fd, data, size, at);
}
int fsync(int fd) { REAL(fsync); FAILS(fd) return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); FAILS(fd) return real(fd); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); FAILS(fd) return real(fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); FAILS(fd) return real(fd, size); }

static long wrong_by(void) {
    static __thread int busy;
    const char *path = getenv("FAULTS_CLOCK");
    long seconds = 0;
    FILE *file;
    if (busy || !path) return 0;
    busy = 1;
    int kept = errno;
    if ((file = fopen(path, "r"))) {
        if (fscanf(file, "%ld", &seconds) != 1) seconds = 0;
        fclose(file);
    }
    errno = kept;
    busy = 0;
    return seconds;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME) now->tv_sec += wrong_by();
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    REAL(gettimeofday);
    int result = real(now, zone);
    if (result == 0) now->tv_sec += wrong_by();
    return result;
}
time_t time(time_t *now) {
    REAL(time);
    time_t found = real(NULL) + wrong_by();
    if (now) *now = found;
    return found;
}
