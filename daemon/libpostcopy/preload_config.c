/* Which files are guest RAM, and where they are handed over: from the environment, once, before main(). */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "preload.h"

#define RAM_VARIABLE "POSTCOPYD_RAM"
#define SOCKET_VARIABLE "POSTCOPYD_SOCKET"
#define PRESENT_VARIABLE "POSTCOPYD_PRESENT"
#define LINE_BYTES 512

struct preload preload = { .lock = PTHREAD_MUTEX_INITIALIZER };

static void write_line(const char *format, va_list arguments)
{
	char line[LINE_BYTES];
	int start = snprintf(line, sizeof line, "libpostcopy-preload: ");
	int written = vsnprintf(line + start, sizeof line - (size_t)start - 1, format, arguments);
	size_t len = strlen(line);

	(void)written;
	line[len] = '\n';
	/* One call, so that lines of several processes do not mix; nobody is left to tell if it fails. */
	if (write(STDERR_FILENO, line, len + 1) < 0)
		return;
}

void preload_say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	write_line(format, arguments);
	va_end(arguments);
}

_Noreturn void preload_fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	write_line(format, arguments);
	va_end(arguments);
	/* Not exit(): its handlers are the VMM's, and may wait for a thread that waits for a page. */
	_exit(1);
}

static bool is_set(const char *name)
{
	const char *value = getenv(name);

	return value && *value && strcmp(value, "0");
}

/* Cut `list` at its commas, as a memfd's name has a colon, into `entry`; how many there are. */
static size_t split(char *list, char *entry[PRELOAD_BLOCKS_MAX], const char *name)
{
	size_t count = 0;

	for (char *rest = list, *part; (part = strsep(&rest, ","));) {
		if (!*part)
			continue;
		if (count == PRELOAD_BLOCKS_MAX)
			preload_fail("%s lists more than %d files", name, PRELOAD_BLOCKS_MAX);
		entry[count++] = part;
	}
	return count;
}

static void add_block(char *ram, char *socket)
{
	struct preload_block *block = &preload.block[preload.blocks++];
	size_t len = strlen(ram);

	if (strlen(socket) >= sizeof((struct sockaddr_un *)0)->sun_path)
		preload_fail("%s: a socket's path has at most 107 bytes, not %s", SOCKET_VARIABLE, socket);
	block->prefix = ram[len - 1] == '*';
	if (block->prefix)
		ram[len - 1] = 0;
	block->ram = ram;
	block->socket = socket;
	block->uffd = block->state = block->sock = -1;
}

void preload_configure(void)
{
	const char *rams = getenv(RAM_VARIABLE), *sockets = getenv(SOCKET_VARIABLE);
	char *ram[PRELOAD_BLOCKS_MAX], *socket[PRELOAD_BLOCKS_MAX];
	size_t count;

	if (!rams && !sockets)
		return;
	if (!rams || !sockets)
		preload_fail("%s is set and %s is not; both are needed", rams ? RAM_VARIABLE : SOCKET_VARIABLE,
			     rams ? SOCKET_VARIABLE : RAM_VARIABLE);
	/* Kept for ever: blocks point into them, and the VMM may change its environment. */
	rams = strdup(rams);
	sockets = strdup(sockets);
	if (!rams || !sockets)
		preload_fail("no memory");
	count = split((char *)rams, ram, RAM_VARIABLE);
	if (!count || split((char *)sockets, socket, SOCKET_VARIABLE) != count)
		preload_fail("%s and %s must name as many files as sockets, at least one, with commas between", RAM_VARIABLE,
			     SOCKET_VARIABLE);
	for (size_t i = 0; i < count; i++)
		add_block(ram[i], socket[i]);
	preload.wait = is_set("POSTCOPYD_WAIT");
	preload.present = is_set(PRESENT_VARIABLE) ? strdup(getenv(PRESENT_VARIABLE)) : NULL;
	if (preload.present && preload.blocks > 1)
		preload_fail("%s goes with one file in %s", PRESENT_VARIABLE, RAM_VARIABLE);
}

struct preload_block *preload_match(int fd)
{
	char link[32], path[PATH_MAX];
	ssize_t len;

	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	len = readlink(link, path, sizeof path - 1);
	if (len < 0)
		return NULL;
	path[len] = 0;
	for (size_t i = 0; i < preload.blocks; i++) {
		struct preload_block *block = &preload.block[i];
		size_t compared = block->prefix ? strlen(block->ram) : (size_t)len + 1;

		if (!strncmp(path, block->ram, compared))
			return block;
	}
	return NULL;
}
