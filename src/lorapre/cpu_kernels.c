/* The operations of a step of Adam on tiles of gradients, for CPUs; cpu_kernels.py compiles and calls them.

   A tile is a part (rows, columns) of each of `count` same-shaped matrices. Everything is computed in float32,
   whatever the dtype. In what order a sum is formed depends on the shape and on the width of the processor's vectors,
   never on the number of threads or on which of them was first.

   Products are made as in BLIS (Van Zee, van de Geijn 2015): a block of ROWS x VECTORS vectors of the result stays
   in registers while one operand is read a number at a time and the other, packed, a panel row at a time. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8 }; /* 24 of 32 registers hold sums */
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 4 }; /* 12 of 16 */
#else
enum { LANES = 4, ROWS = 8 }; /* 24 of 32, of Arm */
#endif
enum {
    VECTORS = 3,
    PANEL = VECTORS * LANES, /* columns of a block of a product */
    DEPTH = 128,             /* terms of a sum that are added up before they join the rest: a panel fits the first cache */
    HEIGHT = 128,            /* rows that a thread takes, for whose products a panel is packed once */
    SPAN = 8 * PANEL,        /* columns that a thread takes in `column_products` */
    WIDTH = 8 * PANEL,       /* and in `products` */
    NARROW = 32,             /* rows of a block of a root */
};

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define ALIGNED __attribute__((aligned(64)))

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { FACTORS, DENSE, SPLIT };

/* What cpu_kernels.py hands over: gradients, weights and how a moment comes about. `data`, B, A, row and column have an
   address for each matrix, `finite`, keys, decay, lr, keep and fresh a number. Strides are from row to row. */
typedef struct {
    int64_t count, rows, columns, stride, dtype, threads;
    void *const *data;
    const uint8_t *finite; /* or NULL */
    float sign;
} Tile;

typedef struct {
    void *const *data;
    int64_t stride, dtype, row0, column0, width;
    const int64_t *keys; /* or NULL: rounded to nearest */
    const float *decay, *lr;
    float eps;
} Weights;

typedef struct {
    int64_t kind, rank;
    float *const *B, *const *A; /* of DENSE, B is the moment; of SPLIT they are C and W */
    int64_t B_stride, A_stride;
    const float *keep, *fresh;         /* of DENSE, `keep` is the correction */
    float share;                       /* of DENSE, 1 - beta */
    float *const *row, *const *column; /* or NULL */
} Moment;

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t blocks(int64_t length, int64_t size) { return (length + size - 1) / size; }

INLINE float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

INLINE uint16_t nearest_bfloat16(float x) {
    uint32_t bits = float_to_bits(x);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? (bits >> 16) | 0x40 : rounded);
}

/* Bit for bit `round_` of rounding.py. */
INLINE uint16_t noisy_bfloat16(float x, uint32_t index, uint32_t key) {
    uint32_t h = (index * 0x9E3779B1u) ^ key, bits = float_to_bits(x);
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    h ^= h >> 16;
    uint32_t rounded = (bits + (h & 0xFFFF)) >> 16;
    uint32_t infinite = (rounded & 0x7F80) == 0x7F80; /* by a carry: the largest number then */
    rounded -= infinite;
    return (uint16_t)((bits & 0x7F800000) == 0x7F800000 ? nearest_bfloat16(x) : rounded);
}

INLINE void load_some(float *to, const void *from, int64_t dtype, const int64_t n) {
    if (dtype == FLOAT32)
        for (int64_t j = 0; j < n; j++) to[j] = ((const float *)from)[j];
    else if (dtype == BFLOAT16)
        for (int64_t j = 0; j < n; j++) to[j] = bits_to_float((uint32_t)((const uint16_t *)from)[j] << 16);
    else
        for (int64_t j = 0; j < n; j++) to[j] = (float)((const _Float16 *)from)[j];
}

/* n <= count numbers from `from`, as float32, and zeros up to count. */
INLINE void load(float *to, const void *from, int64_t dtype, int64_t n, int64_t count) {
    if (n == PANEL) load_some(to, from, dtype, PANEL); /* much faster for a constant */
    else load_some(to, from, dtype, n);
    for (int64_t j = n; j < count; j++) to[j] = 0;
}

/* n numbers, rounded to the dtype; to a bfloat16 nearby, if there is a key, by the index of the first. */
INLINE void store_some(void *to, const float *from, int64_t dtype, const int64_t n, const int64_t *key,
                       uint32_t index) {
    if (dtype == FLOAT32)
        for (int64_t j = 0; j < n; j++) ((float *)to)[j] = from[j];
    else if (dtype == FLOAT16)
        for (int64_t j = 0; j < n; j++) ((_Float16 *)to)[j] = (_Float16)from[j];
    else if (key)
        for (int64_t j = 0; j < n; j++)
            ((uint16_t *)to)[j] = noisy_bfloat16(from[j], index + (uint32_t)j, (uint32_t)*key);
    else
        for (int64_t j = 0; j < n; j++) ((uint16_t *)to)[j] = nearest_bfloat16(from[j]);
}

INLINE void store(void *to, const float *from, int64_t dtype, int64_t n, const int64_t *key, uint32_t index) {
    if (n == PANEL) store_some(to, from, dtype, PANEL, key, index);
    else store_some(to, from, dtype, n, key, index);
}

INLINE const void *address(const void *data, int64_t dtype, int64_t index) {
    return (const char *)data + index * (dtype == FLOAT32 ? 4 : 2);
}

/* The hardware does not foresee the step to another panel. */
INLINE void prefetch(const void *data, int64_t dtype, int64_t index, int64_t n) {
    const char *const from = address(data, dtype, index), *const end = address(data, dtype, index + n);
    for (const char *line = from; line < end; line += 64) __builtin_prefetch(line);
}

/* Columns j to j + n of row i of a gradient, and zeros up to count. */
INLINE void load_gradient(const Tile *t, int64_t matrix, int64_t i, int64_t j, int64_t n, int64_t count, float *to) {
    if (t->finite && !t->finite[matrix]) {
        memset(to, 0, (size_t)count * 4);
        return;
    }
    load(to, address(t->data[matrix], t->dtype, i * t->stride + j), t->dtype, n, count);
    if (t->sign != 1)
        for (int64_t k = 0; k < n; k++) to[k] *= t->sign;
}

INLINE void absolute(float *x, int64_t count) {
    for (int64_t j = 0; j < count; j++) x[j] = fabsf(x[j]);
}

/* n <= PANEL columns of K rows, side by side in `vectors` vectors that zeros fill up. Of columns next to each other, or
   else of rows. */
INLINE void pack(float *to, const float *from, int64_t row, int64_t column, int64_t K, int64_t n, int64_t vectors) {
    const int64_t width = vectors * LANES;
    if (column == 1)
        for (int64_t k = 0; k < K; k++, to += width, from += row) {
            if (n == PANEL) memcpy(to, from, PANEL * 4);
            else memcpy(to, from, (size_t)n * 4);
            for (int64_t j = n; j < width; j++) to[j] = 0;
        }
    else
        for (int64_t k0 = 0; k0 < K; k0 += 16) /* a line of the cache at a time */
            for (int64_t j = 0; j < width; j++)
                for (int64_t k = k0; k < min(k0 + 16, K); k++)
                    to[k * width + j] = j < n ? from[k * row + j * column] : 0;
}

/* c[i][j] (+)= sum over k < K of a[i * row + k * step] b[k][j], for `rows` x `vectors` LANES, both constants. Sums are
   added to what is there at the end, so that errors of long ones in parts do not grow with their length. */
INLINE void block(const int rows, const int vectors, int64_t K, const float *a, int64_t row, int64_t step,
                  const float *b, float *c, int64_t c_stride, int add) {
    vec sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = (vec){0};
    for (int64_t k = 0; k < K; k++, a += step, b += vectors * LANES) {
        vec y[VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) y[j] = *(const vec *)(b + j * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            const float x = a[i * row];
            UNROLL for (int j = 0; j < vectors; j++) sum[i][j] += x * y[j];
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) {
            vec *const to = (vec *)(c + i * c_stride + j * LANES);
            if (add) sum[i][j] += *to;
            *to = sum[i][j];
        }
}

INLINE void rows_of_blocks(int64_t rows, const int vectors, int64_t K, const float *a, int64_t row, int64_t step,
                           const float *b, float *c, int64_t c_stride, int add) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        block(ROWS, vectors, K, a + i * row, row, step, b, c + i * c_stride, c_stride, add);
    for (; i < rows; i++) block(1, vectors, K, a + i * row, row, step, b, c + i * c_stride, c_stride, add);
}

static void product(int64_t rows, int64_t vectors, int64_t K, const float *a, int64_t row, int64_t step,
                    const float *b, float *c, int64_t c_stride, int add) {
    if (vectors == 1) rows_of_blocks(rows, 1, K, a, row, step, b, c, c_stride, add);
    else if (vectors == 2) rows_of_blocks(rows, 2, K, a, row, step, b, c, c_stride, add);
    else rows_of_blocks(rows, 3, K, a, row, step, b, c, c_stride, add);
}

/* Which of the threads this is. */
INLINE int64_t thread(void) {
#ifdef _OPENMP
    extern int omp_get_thread_num(void);
    return omp_get_thread_num();
#else
    return 0;
#endif
}

INLINE int64_t padded(int64_t r) { return blocks(r, LANES) * LANES; }

/* Floats of scratch space that `row_products` wants. */
int64_t row_products_scratch(int64_t count, int64_t columns, int64_t rank, int64_t threads) {
    return count * columns * padded(rank) + threads * HEIGHT * (DEPTH + padded(rank));
}

/* out (count, rows, rank) = T P^T with P (rank, columns) of each, T the gradient or its absolute value. */
void row_products(const Tile *t, const float *const *P, int64_t P_stride, int64_t rank, int64_t absolutes, float *out,
                  float *scratch) {
    const int64_t parts = blocks(t->columns, DEPTH), full = padded(rank);
    const int64_t bands = blocks(t->rows, HEIGHT);
    float *const packed = scratch, *const space = scratch + t->count * t->columns * full;
#pragma omp parallel num_threads((int)t->threads)
    {
        /* P^T by panels: of each part of the columns and each group of ranks (columns, vectors LANES). */
#pragma omp for schedule(static)
        for (int64_t item = 0; item < t->count * parts; item++) {
            const int64_t n = item / parts, j0 = item % parts * DEPTH, w = min(DEPTH, t->columns - j0);
            for (int64_t k0 = 0; k0 < rank; k0 += PANEL) {
                pack(packed + (n * t->columns + j0) * full + k0 * w, P[n] + k0 * P_stride + j0, 1, P_stride, w,
                     min(PANEL, rank - k0), min(VECTORS, (full - k0) / LANES));
            }
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t item = 0; item < t->count * bands; item++) {
            const int64_t n = item / bands, i0 = item % bands * HEIGHT, h = min(HEIGHT, t->rows - i0);
            float *const tile = space + thread() * HEIGHT * (DEPTH + full);
            float *const sums = tile + HEIGHT * DEPTH;
            if (t->columns == 0) memset(sums, 0, (size_t)(HEIGHT * full) * 4);
            for (int64_t j0 = 0; j0 < t->columns; j0 += DEPTH) {
                const int64_t w = min(DEPTH, t->columns - j0);
                for (int64_t i = 0; i < h; i++) {
                    load_gradient(t, n, i0 + i, j0, w, w, tile + i * DEPTH);
                    if (absolutes) absolute(tile + i * DEPTH, w);
                }
                for (int64_t k0 = 0; k0 < full; k0 += PANEL)
                    product(h, min(VECTORS, (full - k0) / LANES), w, tile, DEPTH, 1,
                            packed + (n * t->columns + j0) * full + k0 * w, sums + k0, full, j0 > 0);
            }
            for (int64_t i = 0; i < h; i++)
                memcpy(out + ((n * t->rows + i0 + i) * rank), sums + i * full, (size_t)rank * 4);
        }
    }
}

/* Floats of scratch space that `column_products` wants. */
int64_t column_products_scratch(int64_t rank, int64_t threads) { return threads * SPAN * (HEIGHT + rank); }

/* out (count, rank, columns) = L^T T with L (rows, rank) of each, T the gradient or its absolute value. */
void column_products(const Tile *t, const float *const *L, int64_t L_stride, int64_t L_step, int64_t rank,
                     int64_t absolutes, float *out, float *scratch) {
    const int64_t spans = blocks(t->columns, SPAN);
#pragma omp parallel num_threads((int)t->threads)
    {
        float *const tile = scratch + thread() * SPAN * (HEIGHT + rank);
        float *const sums = tile + SPAN * HEIGHT;
#pragma omp for schedule(dynamic) nowait
        for (int64_t item = 0; item < t->count * spans; item++) {
            const int64_t n = item / spans, j0 = item % spans * SPAN, w = min(SPAN, t->columns - j0);
            const int64_t panels = blocks(w, PANEL);
            for (int64_t i0 = 0; i0 < t->rows; i0 += HEIGHT) {
                const int64_t h = min(HEIGHT, t->rows - i0);
                for (int64_t i = 0; i < h; i++)
                    for (int64_t panel = 0; panel < panels; panel++) {
                        float *const to = tile + (panel * HEIGHT + i) * PANEL;
                        const int64_t j = panel * PANEL;
                        load_gradient(t, n, i0 + i, j0 + j, min(PANEL, w - j), PANEL, to);
                        if (absolutes) absolute(to, PANEL);
                    }
                for (int64_t panel = 0; panel < panels; panel++)
                    product(rank, VECTORS, h, L[n] + i0 * L_stride, L_step, L_stride,
                            tile + panel * HEIGHT * PANEL, sums + panel * PANEL, SPAN, i0 > 0);
            }
            if (t->rows == 0) memset(sums, 0, (size_t)(rank * SPAN) * 4);
            for (int64_t k = 0; k < rank; k++)
                memcpy(out + (n * rank + k) * t->columns + j0, sums + k * SPAN, (size_t)w * 4);
        }
    }
}

/* Floats of scratch space that `adam` wants, sums of columns in parts included. */
int64_t adam_scratch(int64_t count, int64_t rows, int64_t columns, int64_t threads, int64_t sums) {
    const int64_t parts = sums ? count * blocks(rows, HEIGHT) * columns : 0;
    return threads * (PANEL * (2 * HEIGHT + DEPTH) + HEIGHT * LANES) + parts;
}

/* Products of the h rows of B at i0 with the columns of A at j0, (h, PANEL). */
INLINE void moment_product(const Moment *m, int64_t n, int64_t i0, int64_t h, int64_t j0, int64_t w, float *panel,
                           float *to) {
    for (int64_t k0 = 0; k0 < m->rank; k0 += DEPTH) {
        const int64_t K = min(DEPTH, m->rank - k0);
        pack(panel, m->A[n] + k0 * m->A_stride + j0, m->A_stride, 1, K, w, VECTORS);
        product(h, VECTORS, K, m->B[n] + i0 * m->B_stride + k0, m->B_stride, 1, panel, to, PANEL, k0 > 0);
    }
}

/* A dense moment, the EMA of g (PANEL) or, the second, of g^2, updated in place and taken divided by the correction. */
INLINE void dense(const Moment *m, const int second, int64_t n, int64_t i, int64_t j, int64_t w, const float *g,
                  float *to) {
    float *const ema = m->B[n] + i * m->B_stride + j;
    const float fresh = m->share, correction = m->keep[n];
    for (int64_t k = 0; k < w; k++) {
        /* No difference: a square may be infinite, and the EMA then is for good. */
        const float part = second ? fresh * g[k] * g[k] : fresh * g[k];
        ema[k] = (1 - fresh) * ema[k] + part;
        to[k] = ema[k] / correction;
    }
    for (int64_t k = w; k < PANEL; k++) to[k] = 0;
}

/* Weights <- decay weights - lr m / (sqrt(v) + eps); sums of g^2 over rows (count, rows) and columns
   (count, columns) are added to `row_sums` and `column_sums`, unless these are NULL. */
void adam(const Tile *t, const Weights *w, const Moment *first, const Moment *second, float *row_sums,
          float *column_sums, float *scratch) {
    const int64_t bands = blocks(t->rows, HEIGHT), space = PANEL * (2 * HEIGHT + DEPTH) + HEIGHT * LANES;
    float *const parts = scratch + t->threads * space;
#pragma omp parallel num_threads((int)t->threads)
    {
        float *const M = scratch + thread() * space, *const V = M + HEIGHT * PANEL;
        float *const panel = V + HEIGHT * PANEL;
        float *const of_rows = panel + PANEL * DEPTH; /* a vector of partial sums for each row */
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < t->count * bands; item++) {
            const int64_t n = item / bands, i0 = item % bands * HEIGHT, h = min(HEIGHT, t->rows - i0);
            const int skipped = t->finite && !t->finite[n];
            memset(of_rows, 0, HEIGHT * LANES * 4);
            for (int64_t j0 = 0; j0 < t->columns; j0 += PANEL) {
                const int64_t width = min(PANEL, t->columns - j0);
                float squares[PANEL] ALIGNED = {0}, column[PANEL] ALIGNED = {0};
                if (skipped) {
                    if (column_sums) memset(parts + item * t->columns + j0, 0, (size_t)width * 4);
                    continue;
                }
                if (first->kind == FACTORS) moment_product(first, n, i0, h, j0, width, panel, M);
                if (second->kind != DENSE) moment_product(second, n, i0, h, j0, width, panel, V);
                if (second->column) memcpy(column, second->column[n] + j0, (size_t)width * 4);
                for (int64_t i = 0; i < h; i++) {
                    float g[PANEL] ALIGNED, square[PANEL] ALIGNED, x[PANEL] ALIGNED;
                    float *const m = M + i * PANEL, *const v = V + i * PANEL;
                    prefetch(t->data[n], t->dtype, (i0 + i) * t->stride + j0 + PANEL, PANEL);
                    prefetch(w->data[n], w->dtype, (i0 + i) * w->stride + j0 + PANEL, PANEL);
                    load_gradient(t, n, i0 + i, j0, width, PANEL, g);
                    for (int k = 0; k < PANEL; k++) square[k] = g[k] * g[k];
                    if (column_sums)
                        for (int k = 0; k < PANEL; k++) squares[k] += square[k];
                    if (row_sums) {
                        vec *const total = (vec *)(of_rows + i * LANES);
                        for (int k = 0; k < VECTORS; k++) *total += *(const vec *)(square + k * LANES);
                    }
                    if (first->kind == DENSE) dense(first, 0, n, i0 + i, j0, width, g, m);
                    else if (second->kind != SPLIT)
                        for (int k = 0; k < PANEL; k++) m[k] = first->keep[n] * m[k] + first->fresh[n] * g[k];
                    if (second->kind == DENSE) dense(second, 1, n, i0 + i, j0, width, g, v);
                    else if (second->kind == SPLIT) {
                        const float kept = second->keep[n] * (1 - second->share);
                        const float held = second->keep[n] * second->share;
                        const float row = second->row[n][i0 + i], fresh = second->fresh[n];
                        const float keep_m = first->keep[n], fresh_m = first->fresh[n];
                        for (int k = 0; k < PANEL; k++) {
                            /* Weighed before they are squared: a square may be infinite, and a weight zero. */
                            const float of_m = (kept * m[k]) * m[k], of_h = (held * v[k]) * v[k];
                            const float part = m[k] - v[k];
                            v[k] = of_m + of_h + fresh * g[k] * g[k] + row * column[k];
                            m[k] = keep_m * part + fresh_m * g[k];
                        }
                    } else {
                        const float row = second->row ? second->row[n][i0 + i] : 1;
                        for (int k = 0; k < PANEL; k++) {
                            const float root = row * v[k] * (second->column ? column[k] : 1);
                            v[k] = second->keep[n] * root * root + second->fresh[n] * g[k] * g[k];
                        }
                    }
                    const int64_t at = (i0 + i) * w->stride + j0;
                    load(x, address(w->data[n], w->dtype, at), w->dtype, width, PANEL);
                    const float decay = w->decay[n], lr = w->lr[n], eps = w->eps;
                    for (int k = 0; k < PANEL; k++) x[k] = decay * x[k] - lr * m[k] / (sqrtf(v[k]) + eps);
                    store((void *)address(w->data[n], w->dtype, at), x, w->dtype, width, w->keys ? w->keys + n : NULL,
                          (uint32_t)((w->row0 + i0 + i) * w->width + w->column0 + j0));
                }
                if (column_sums) memcpy(parts + item * t->columns + j0, squares, (size_t)width * 4);
            }
            for (int64_t i = 0; row_sums && i < h; i++) {
                float sum = 0;
                for (int k = 0; k < LANES; k++) sum += of_rows[i * LANES + k];
                row_sums[n * t->rows + i0 + i] += sum;
            }
        }
        if (column_sums) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < t->count; n++)
                for (int64_t band = 0; band < bands; band++)
                    for (int64_t j = 0; j < t->columns; j++)
                        column_sums[n * t->columns + j] += parts[(n * bands + band) * t->columns + j];
        }
    }
}

/* Floats of scratch space that `products` wants. */
int64_t products_scratch(int64_t threads) { return threads * (DEPTH * PANEL + HEIGHT * WIDTH); }

enum { GENERAL, LOWER, UPPER, SYMMETRIC };

/* out (count, a, c) = X Y of X (count, a, b) and Y (count, b, c); strides are those of matrices, rows and columns.
   Zeros are not multiplied where X is LOWER or Y UPPER triangular, nor half of what is SYMMETRIC. */
void products(int64_t count, int64_t a, int64_t b, int64_t c, const float *X, const int64_t *Xs, const float *Y,
              const int64_t *Ys, int64_t kind, float *out, int64_t threads, float *scratch) {
    /* Parts of the result; in what order a sum is formed does not depend on them. */
    const int64_t few = count * blocks(a, HEIGHT) < 2 * threads, height = few ? HEIGHT / 4 : HEIGHT;
    const int64_t width = few ? PANEL : WIDTH, bands = blocks(a, height), groups = blocks(c, width);
#pragma omp parallel num_threads((int)threads)
    {
        float *const panel = scratch + thread() * (DEPTH * PANEL + HEIGHT * WIDTH), *const sums = panel + DEPTH * PANEL;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < count * bands * groups; item++) {
            const int64_t n = item / (bands * groups), i0 = item / groups % bands * height, h = min(height, a - i0);
            const int64_t first = item % groups * width, last = min(first + width, c);
            for (int64_t k0 = 0; k0 < b || k0 == 0; k0 += DEPTH)
                for (int64_t j0 = first; j0 < last; j0 += PANEL) {
                    const int64_t vectors = min(VECTORS, blocks(c - j0, LANES));
                    int64_t K = min(DEPTH, b - k0), start = 0;
                    if (kind == UPPER) K = min(K, j0 + PANEL - k0);
                    if (kind == LOWER) start = k0 > i0 ? (k0 - i0) / ROWS * ROWS : 0;
                    if (kind == SYMMETRIC) start = j0 > i0 ? (j0 - i0) / ROWS * ROWS : 0;
                    if (K < 0 || start >= h) continue;
                    pack(panel, Y + n * Ys[0] + k0 * Ys[1] + j0 * Ys[2], Ys[1], Ys[2], K, min(PANEL, c - j0), vectors);
                    for (int64_t i = start; i < h; i += 4 * ROWS) {
                        const int64_t rows = min(4 * ROWS, h - i);
                        product(rows, vectors, kind == LOWER ? min(K, i0 + i + rows - k0) : K,
                                X + n * Xs[0] + (i0 + i) * Xs[1] + k0 * Xs[2], Xs[1], Xs[2], panel,
                                sums + i * WIDTH + j0 - first, WIDTH, k0 > 0);
                    }
                }
            for (int64_t i = 0; i < h; i++)
                memcpy(out + (n * a + i0 + i) * c + first, sums + i * WIDTH, (size_t)(last - first) * 4);
        }
        if (kind == SYMMETRIC) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < count; n++)
                for (int64_t i = 0; i < a; i++)
                    for (int64_t j = i + 1; j < c; j++) out[(n * a + i) * c + j] = out[(n * a + j) * c + i];
        }
    }
}

/* U, upper triangular, and R = U^-T of the n x n matrix G = U^T U in U; lines are `line` apart. Where rounding has left
   nothing of a direction, its row of R is zero. */
static void small_root(int64_t n, float *U, float *R, int64_t line) {
    for (int64_t k = 0; k < n; k++) {
        float *const row = U + k * line;
        const float pivot = row[k], inverse = pivot <= 0 ? 0 : 1 / sqrtf(pivot);
        for (int64_t j = k; j < n; j++) row[j] *= inverse;
        for (int64_t i = k + 1; i < n; i++)
            for (int64_t j = i; j < n; j++) U[i * line + j] -= row[i] * row[j];
        R[k * line + k] = inverse;
    }
    for (int64_t i = 0; i < n; i++) {
        float *const to = R + i * line;
        const float inverse = to[i];
        to[i] = 0;
        for (int64_t k = 0; k < i; k++)
            for (int64_t j = 0; j <= k; j++) to[j] -= U[k * line + i] * R[k * line + j];
        for (int64_t j = 0; j < i; j++) to[j] *= inverse;
        to[i] = inverse;
    }
}

INLINE int64_t line_of(int64_t r) { return blocks(r, PANEL) * PANEL; }

/* The same of matrices of any size, by blocks of NARROW rows, most of it products; lines are `line_of(r)` apart, and
   `panel` holds 2 r PANEL floats. */
static void root(int64_t r, float *U, float *R, float *panel) {
    const int64_t line = line_of(r);
    float *const block = panel + r * PANEL;
    for (int64_t k0 = 0; k0 < r; k0 += NARROW) {
        const int64_t n = min(NARROW, r - k0), next = k0 + n;
        small_root(n, U + k0 * line + k0, R + k0 * line + k0, line);
        for (int64_t j0 = next / PANEL * PANEL; j0 < r; j0 += PANEL) {
            /* The rest of the rows of U, to the left of which nothing is read, and what they leave of G. */
            pack(panel, U + k0 * line + j0, line, 1, n, PANEL, VECTORS);
            product(n, VECTORS, n, R + k0 * line + k0, line, 1, panel, block, PANEL, 0);
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < PANEL; j++)
                    if (j0 + j >= next) U[(k0 + i) * line + j0 + j] = block[i * PANEL + j];
        }
        for (int64_t j0 = next / PANEL * PANEL; j0 < r; j0 += PANEL) {
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < PANEL; j++) panel[i * PANEL + j] = -U[(k0 + i) * line + j0 + j];
            product(min(r, j0 + PANEL) - next, VECTORS, n, U + k0 * line + next, 1, line, panel,
                    U + next * line + j0, line, 1);
        }
        for (int64_t j0 = 0; j0 < k0; j0 += PANEL) {
            pack(panel, R + j0, line, 1, k0, PANEL, VECTORS);
            product(n, VECTORS, k0, U + k0, 1, line, panel, block, PANEL, 0);
            pack(panel, block, PANEL, 1, n, PANEL, VECTORS);
            product(n, VECTORS, n, R + k0 * line + k0, line, 1, panel, block, PANEL, 0);
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < PANEL && j0 + j < k0; j++) R[(k0 + i) * line + j0 + j] = -block[i * PANEL + j];
        }
    }
}

/* Floats of scratch space that `inverse_roots` and `whitening` want. */
int64_t roots_scratch(int64_t r, int64_t threads) { return threads * (2 * r * line_of(r) + 2 * r * PANEL + r); }

/* R (count, r, r), lower triangular, of G (count, r, r): R^T R = G^-1. */
void inverse_roots(int64_t count, int64_t r, const float *G, float *out, int64_t threads, float *scratch) {
    const int64_t line = line_of(r);
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t n = 0; n < count; n++) {
        float *const U = scratch + thread() * roots_scratch(r, 1), *const R = U + r * line;
        memset(U, 0, (size_t)(2 * r * line) * 4);
        for (int64_t i = 0; i < r; i++) memcpy(U + i * line, G + (n * r + i) * r, (size_t)r * 4);
        root(r, U, R, R + r * line);
        for (int64_t i = 0; i < r; i++) memcpy(out + (n * r + i) * r, R + i * line, (size_t)r * 4);
    }
}

/* With S the diagonal that makes that of S G S one, and R the inverse root of S G S + shift I: S R^T (count, r, r), and
   the squared lengths of the rows of R (count, r). */
void whitening(int64_t count, int64_t r, const float *G, float shift, float *out, float *lengths, int64_t threads,
               float *scratch) {
    const int64_t line = line_of(r);
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t n = 0; n < count; n++) {
        float *const U = scratch + thread() * roots_scratch(r, 1), *const R = U + r * line, *const scale = R + r * line;
        memset(U, 0, (size_t)(2 * r * line) * 4);
        for (int64_t i = 0; i < r; i++) {
            const float square = G[(n * r + i) * r + i];
            scale[i] = square <= 0 ? 0 : 1 / sqrtf(square);
        }
        for (int64_t i = 0; i < r; i++) {
            for (int64_t j = 0; j < r; j++) U[i * line + j] = scale[i] * G[(n * r + i) * r + j] * scale[j];
            U[i * line + i] += shift;
        }
        root(r, U, R, scale + r);
        for (int64_t i = 0; i < r; i++) {
            float sum = 0;
            for (int64_t j = 0; j <= i; j++) sum += R[i * line + j] * R[i * line + j];
            lengths[n * r + i] = sum;
        }
        for (int64_t j = 0; j < r; j++)
            for (int64_t i = 0; i < r; i++) out[(n * r + j) * r + i] = scale[j] * R[i * line + j];
    }
}
