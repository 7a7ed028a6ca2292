/* The images of a page server by id. Filled before it serves; afterwards only read. */
#ifndef POSTCOPYD_IMAGE_CATALOG_H
#define POSTCOPYD_IMAGE_CATALOG_H

#include <stdbool.h>
#include <stddef.h>

#include "image.h"

#define IMAGE_ID_MAX 128u

struct image_catalog;

struct image_catalog *image_catalog_new(void);
/* Frees the images too. No page stream of this catalogue may exist any more. */
void image_catalog_free(struct image_catalog *catalog);

/*
 * Takes the image over. False: the id is empty, longer than IMAGE_ID_MAX or taken, or memory is short; the
 * image stays with the caller.
 */
bool image_catalog_add(struct image_catalog *catalog, const char *id, size_t id_len, struct image *image);

/* NULL: no such image, or it was released. */
struct image *image_catalog_find(const struct image_catalog *catalog, const char *id, size_t id_len);

#endif
