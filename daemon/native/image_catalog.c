#include "image_catalog.h"

#include <stdlib.h>
#include <string.h>

struct entry {
    char id[IMAGE_ID_MAX];
    size_t id_len;
    struct image *image;
};

struct image_catalog {
    struct entry *entries;
    size_t count;
};

struct image_catalog *image_catalog_new(void)
{
    return calloc(1, sizeof(struct image_catalog));
}

void image_catalog_free(struct image_catalog *catalog)
{
    if (!catalog)
        return;
    for (size_t i = 0; i < catalog->count; i++)
        image_free(catalog->entries[i].image);
    free(catalog->entries);
    free(catalog);
}

static const struct entry *find_entry(const struct image_catalog *catalog, const char *id, size_t id_len)
{
    for (size_t i = 0; i < catalog->count; i++) {
        const struct entry *entry = &catalog->entries[i];
        if (entry->id_len == id_len && memcmp(entry->id, id, id_len) == 0)
            return entry;
    }
    return NULL;
}

bool image_catalog_add(struct image_catalog *catalog, const char *id, size_t id_len, struct image *image)
{
    struct entry *entries;

    if (id_len == 0 || id_len > IMAGE_ID_MAX || find_entry(catalog, id, id_len))
        return false;
    entries = realloc(catalog->entries, (catalog->count + 1) * sizeof *entries);
    if (!entries)
        return false;
    catalog->entries = entries;
    entries[catalog->count] = (struct entry){ .id_len = id_len, .image = image };
    memcpy(entries[catalog->count].id, id, id_len);
    catalog->count++;
    return true;
}

struct image *image_catalog_find(const struct image_catalog *catalog, const char *id, size_t id_len)
{
    const struct entry *entry = find_entry(catalog, id, id_len);

    return entry && !image_is_released(entry->image) ? entry->image : NULL;
}
