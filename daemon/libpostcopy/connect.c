/* postcopy_connect, postcopy_close, postcopy_reattach: the handle's life. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "attach.h"
#include "memory.h"
#include "message.h"
#include "resolve.h"

#define DEFAULT_TIMEOUT_MS 5000u
/* Above these the message does not fit anyway. */
#define REGIONS_MAX 4096u
#define PINNED_MAX 4096u

static int by_gpa(const void *left, const void *right)
{
	const struct postcopy_region *a = left, *b = right;

	return a->gpa < b->gpa ? -1 : a->gpa > b->gpa;
}

static bool region_makes_sense(const struct postcopy_region *region)
{
	uint64_t odd = region->page_size - 1;

	return region->page_size >= PAGE_BYTES && !(region->page_size & odd) && region->size && region->hva &&
	       !((region->gpa | region->hva | region->size | region->image_offset) & odd) &&
	       region->gpa + region->size >= region->size && region->image_offset + region->size >= region->size;
}

static bool config_makes_sense(const struct postcopy_config *config)
{
	if (config->config_size != sizeof(*config) || config->uffd < 0 || !config->vcpus ||
	    config->vcpus > EXIT_RING_VCPUS_MAX || !config->regions || !config->region_count ||
	    config->region_count > REGIONS_MAX || config->pinned_count > PINNED_MAX)
		return false;
	for (size_t i = 0; i < config->region_count; i++) {
		if (!region_makes_sense(&config->regions[i]))
			return false;
	}
	return true;
}

/* Copy the regions in order; false: no memory, or two overlap. */
static bool copy_regions(struct postcopy *pc, const struct postcopy_config *config)
{
	pc->region = calloc(config->region_count, sizeof(*pc->region));
	if (!pc->region)
		return false;
	memcpy(pc->region, config->regions, config->region_count * sizeof(*pc->region));
	pc->regions = config->region_count;
	qsort(pc->region, pc->regions, sizeof(*pc->region), by_gpa);
	for (size_t i = 1; i < pc->regions; i++) {
		if (pc->region[i].gpa - pc->region[i - 1].gpa < pc->region[i - 1].size) {
			errno = EINVAL;
			return false;
		}
	}
	return true;
}

/* Copy the pinned ranges; false: no memory, or one is not within one region. What is not registered is never absent. */
static bool copy_pinned(struct postcopy *pc, const struct postcopy_config *config)
{
	pc->pinned = calloc(config->pinned_count + 1, sizeof(*pc->pinned));
	if (!pc->pinned)
		return false;
	for (size_t i = 0; i < config->pinned_count; i++) {
		const struct postcopy_region *region = memory_region(pc, config->pinned[i].gpa);

		if (!region || config->pinned[i].size > region->size - (config->pinned[i].gpa - region->gpa)) {
			errno = EINVAL;
			return false;
		}
		pc->pinned[i] = config->pinned[i];
	}
	pc->pinned_count = config->pinned_count;
	return true;
}

static bool copy_config(struct postcopy *pc, const char *path, const struct postcopy_config *config)
{
	pc->timeout_ms = config->timeout_ms ? config->timeout_ms : DEFAULT_TIMEOUT_MS;
	pc->other_memory = config->other_memory;
	pc->context = config->context;
	pc->path = strdup(path);
	return pc->path && copy_regions(pc, config) && copy_pinned(pc, config);
}

static uint64_t image_pages(const struct postcopy *pc)
{
	uint64_t end = 0;

	for (size_t i = 0; i < pc->regions; i++) {
		if (end < pc->region[i].image_offset + pc->region[i].size)
			end = pc->region[i].image_offset + pc->region[i].size;
	}
	return end >> EXIT_RING_PAGE_SHIFT;
}

/* Make the ring in a memfd that nobody can shorten: the daemon would die of SIGBUS, and refuses any other. */
static bool make_ring(struct postcopy *pc, uint32_t vcpus)
{
	uint64_t pages = image_pages(pc), len = exit_ring_bytes(vcpus, pages);
	void *mem;

	if (!len) {
		errno = EINVAL;
		return false;
	}
	pc->ring_fd = memfd_create("postcopy-exit-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (pc->ring_fd < 0 || ftruncate(pc->ring_fd, (off_t)len) ||
	    fcntl(pc->ring_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
		return false;
	mem = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, pc->ring_fd, 0);
	if (mem == MAP_FAILED)
		return false;
	pc->ring_len = len;
	exit_ring_format(&pc->ring, mem, vcpus, pages, pc->image_fd >= 0);
	return true;
}

static bool make_vcpus(struct postcopy *pc, uint32_t vcpus)
{
	pc->vcpu = aligned_alloc(alignof(struct vcpu_side), vcpus * sizeof(*pc->vcpu));
	if (!pc->vcpu)
		return false;
	memset(pc->vcpu, 0, vcpus * sizeof(*pc->vcpu));
	for (uint32_t i = 0; i < vcpus; i++)
		exit_lane_init(&pc->vcpu[i].lane, &pc->ring, i);
	return true;
}

static bool make_descriptors(struct postcopy *pc, int uffd)
{
	pc->uffd = fcntl(uffd, F_DUPFD_CLOEXEC, 0);
	/* Non-blocking: a full counter has rung already, and a vCPU must never wait for the daemon to read it. */
	pc->doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pc->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return pc->uffd >= 0 && pc->doorbell >= 0 && pc->stop_fd >= 0;
}

/* Map the file, if there is one. Pages behind its end are asked for. */
static bool map_image(struct postcopy *pc, const struct postcopy_image *image)
{
	struct stat st;

	if (!image)
		return true;
	pc->image_fd = fcntl(image->fd, F_DUPFD_CLOEXEC, 0);
	if (pc->image_fd < 0 || fstat(pc->image_fd, &st))
		return false;
	pc->image_len = (size_t)st.st_size;
	pc->image = mmap(NULL, pc->image_len, PROT_READ, MAP_SHARED, pc->image_fd, 0);
	if (pc->image == MAP_FAILED)
		pc->image = NULL;
	return pc->image != NULL;
}

/* All that the handle owns, and its message. 0 or -errno. */
static int make_parts(struct postcopy *pc, const char *path, const struct postcopy_config *config)
{
	errno = ENOMEM;
	if (!copy_config(pc, path, config) || !make_descriptors(pc, config->uffd) || !map_image(pc, config->image) ||
	    !make_ring(pc, config->vcpus) ||
	    !make_vcpus(pc, config->vcpus))
		return -errno;
	return message_build(pc, &pc->frame, &pc->frame_len);
}

int postcopy_connect(const char *path, const struct postcopy_config *config, struct postcopy **out)
{
	struct postcopy *pc;
	int result;

	if (!config_makes_sense(config))
		return -EINVAL;
	pc = calloc(1, sizeof(*pc));
	if (!pc)
		return -ENOMEM;
	pc->uffd = pc->ring_fd = pc->doorbell = pc->stop_fd = pc->image_fd = pc->socket = -1;
	result = make_parts(pc, path, config);
	if (!result)
		result = postcopy_reattach(pc);
	if (result)
		postcopy_close(pc);
	else
		*out = pc;
	return result;
}

int postcopy_reattach(struct postcopy *pc)
{
	int sock = attach_daemon(pc);

	if (sock < 0)
		return sock;
	if (pc->socket >= 0)
		close(pc->socket);
	pc->socket = sock;
	return 0;
}

static void close_one(int fd)
{
	if (fd >= 0)
		close(fd);
}

void postcopy_close(struct postcopy *pc)
{
	for (uint32_t i = 0; pc->vcpu && i < pc->ring.vcpus; i++)
		resolve_deinit(&pc->vcpu[i]);
	if (pc->ring.header)
		munmap(pc->ring.header, pc->ring_len);
	if (pc->image)
		munmap((void *)(uintptr_t)pc->image, pc->image_len);
	close_one(pc->socket);
	close_one(pc->uffd);
	close_one(pc->ring_fd);
	close_one(pc->doorbell);
	close_one(pc->stop_fd);
	close_one(pc->image_fd);
	free(pc->vcpu);
	free(pc->frame);
	free(pc->region);
	free(pc->pinned);
	free(pc->path);
	free(pc);
}

bool postcopy_is_complete(const struct postcopy *pc)
{
	return exit_ring_is_complete(&pc->ring);
}
