/* The operations of a step of Adam on tiles of gradients, for CPUs; cpu_kernels.py compiles and calls them.

   A tile is a part (rows, columns) of each of `count` same-shaped matrices. Everything is computed in float32,
   whatever the dtype. Work is cut into blocks that depend on the shape alone, each of them the work of one thread
   from its beginning to its end, so that results do not depend on the number of threads.

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
enum { VECTORS = 3, PANEL = VECTORS * LANES, HEIGHT = 128, DEPTH = 128, SPAN = 4 * PANEL };

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { FACTORS, DENSE, SPLIT };

/* A tile of the gradients, see `Tile` of cpu_kernels.py, as the next three structures. */
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
    const float *keep, *fresh; /* of DENSE, `keep` is the correction */
    float share;                  /* of DENSE, 1 - beta */
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

/* n <= count numbers from `from`, as float32, and zeros up to count. */
INLINE void load(float *to, const void *from, int64_t dtype, int64_t n, int64_t count) {
    if (dtype == FLOAT32)
        for (int64_t j = 0; j < n; j++) to[j] = ((const float *)from)[j];
    else if (dtype == BFLOAT16)
        for (int64_t j = 0; j < n; j++) to[j] = bits_to_float((uint32_t)((const uint16_t *)from)[j] << 16);
    else
        for (int64_t j = 0; j < n; j++) to[j] = (float)((const _Float16 *)from)[j];
    for (int64_t j = n; j < count; j++) to[j] = 0;
}

INLINE const void *address(const void *data, int64_t dtype, int64_t index) {
    return (const char *)data + index * (dtype == FLOAT32 ? 4 : 2);
}

INLINE void prefetch(const void *data, int64_t dtype, int64_t index) {
    for (int k = 0; k < PANEL; k += 16) __builtin_prefetch(address(data, dtype, index + k));
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

/* n <= PANEL columns of K rows, side by side in `vectors` vectors that zeros fill up. */
INLINE void pack(float *to, const float *from, int64_t stride, int64_t K, int64_t n, int64_t vectors) {
    for (int64_t k = 0; k < K; k++, to += vectors * LANES, from += stride) {
        if (n == vectors * LANES) memcpy(to, from, (size_t)(vectors * LANES) * 4);
        else {
            memcpy(to, from, (size_t)n * 4);
            memset(to + n, 0, (size_t)(vectors * LANES - n) * 4);
        }
    }
}

/* c[i][j] (+)= sum over k < K of a[i * row + k * step] b[k][j], for `rows` x `vectors` LANES, both constants. */
INLINE void block(const int rows, const int vectors, int64_t K, const float *a, int64_t row, int64_t step,
                  const float *b, float *c, int64_t c_stride, int add) {
    vec sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++)
            sum[i][j] = add ? *(const vec *)(c + i * c_stride + j * LANES) : (vec){0};
    for (int64_t k = 0; k < K; k++, a += step, b += vectors * LANES) {
        vec y[VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) y[j] = *(const vec *)(b + j * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            const float x = a[i * row];
            UNROLL for (int j = 0; j < vectors; j++) sum[i][j] += x * y[j];
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) *(vec *)(c + i * c_stride + j * LANES) = sum[i][j];
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

INLINE int64_t padded(int64_t r) { return blocks(r, LANES) * LANES; }

/* Floats of scratch space that `row_products` wants. */
int64_t row_products_scratch(int64_t count, int64_t columns, int64_t rank, int64_t threads) {
    return count * columns * padded(rank) + threads * HEIGHT * (DEPTH + padded(rank));
}

/* out (count, rows, rank) = T P^T with P (rank, columns) of each, T the gradient or its absolute value. */
void row_products(const Tile *t, const float *const *P, int64_t P_stride, int64_t rank, int64_t absolutes, float *out,
                  float *scratch) {
    const int64_t parts = blocks(t->columns, DEPTH), groups = blocks(rank, PANEL), full = padded(rank);
    const int64_t bands = blocks(t->rows, HEIGHT);
    float *const packed = scratch, *const space = scratch + t->count * t->columns * full;
#pragma omp parallel num_threads((int)t->threads)
    {
        /* P^T by panels: of each part of the columns and each group of ranks (columns, vectors LANES). */
#pragma omp for schedule(static)
        for (int64_t item = 0; item < t->count * parts; item++) {
            const int64_t n = item / parts, j0 = item % parts * DEPTH, w = min(DEPTH, t->columns - j0);
            for (int64_t k0 = 0; k0 < rank; k0 += PANEL) {
                const int64_t width = min(PANEL, full - k0);
                float *to = packed + (n * t->columns + j0) * full + k0 * w;
                for (int64_t k = 0; k < width; k++)
                    for (int64_t j = 0; j < w; j++)
                        to[j * width + k] = k0 + k < rank ? P[n][(k0 + k) * P_stride + j0 + j] : 0;
            }
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t item = 0; item < t->count * bands; item++) {
            const int64_t n = item / bands, i0 = item % bands * HEIGHT, h = min(HEIGHT, t->rows - i0);
#ifdef _OPENMP
            extern int omp_get_thread_num(void);
            float *const tile = space + omp_get_thread_num() * HEIGHT * (DEPTH + full);
#else
            float *const tile = space;
#endif
            float *const sums = tile + HEIGHT * DEPTH;
            for (int64_t j0 = 0; j0 < t->columns; j0 += DEPTH) {
                const int64_t w = min(DEPTH, t->columns - j0);
                for (int64_t i = 0; i < h; i++) {
                    load_gradient(t, n, i0 + i, j0, w, w, tile + i * DEPTH);
                    if (absolutes) absolute(tile + i * DEPTH, w);
                }
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t k0 = g * PANEL;
                    product(h, min(VECTORS, (full - k0) / LANES), w, tile, DEPTH, 1,
                            packed + (n * t->columns + j0) * full + k0 * w, sums + k0, full, j0 > 0);
                }
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
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        float *const tile = scratch + omp_get_thread_num() * SPAN * (HEIGHT + rank);
#else
        float *const tile = scratch;
#endif
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
int64_t adam_scratch(int64_t count, int64_t rows, int64_t columns, int64_t rank, int64_t threads, int64_t sums) {
    return threads * 2 * PANEL * (HEIGHT + rank) + (sums ? count * blocks(rows, HEIGHT) * columns : 0);
}

/* Products of the h rows of B at i0 with the columns of A at j0, (h, PANEL). */
INLINE void moment_product(const Moment *m, int64_t n, int64_t i0, int64_t h, int64_t j0, int64_t w, float *panel,
                           float *to) {
    pack(panel, m->A[n] + j0, m->A_stride, m->rank, w, VECTORS);
    product(h, VECTORS, m->rank, m->B[n] + i0 * m->B_stride, m->B_stride, 1, panel, to, PANEL, 0);
}

/* The EMA of x (PANEL) in a dense moment, updated in place and taken divided by the correction. */
INLINE void dense(const Moment *m, int64_t n, int64_t i, int64_t j, int64_t w, const float *x, float *to) {
    float *const ema = m->B[n] + i * m->B_stride + j;
    for (int64_t k = 0; k < w; k++) {
        ema[k] += m->share * (x[k] - ema[k]);
        to[k] = ema[k] / m->keep[n];
    }
    for (int64_t k = w; k < PANEL; k++) to[k] = 0;
}

/* Weights <- decay weights - lr m / (sqrt(v) + eps); sums of g^2 over rows (count, rows) and columns
   (count, columns) are added to `row_sums` and `column_sums`, unless these are NULL. */
void adam(const Tile *t, const Weights *w, const Moment *first, const Moment *second, float *row_sums,
          float *column_sums, float *scratch) {
    const int64_t bands = blocks(t->rows, HEIGHT), rank = first->rank > second->rank ? first->rank : second->rank;
    float *const parts = scratch + t->threads * 2 * PANEL * (HEIGHT + rank);
#pragma omp parallel num_threads((int)t->threads)
    {
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        float *const M = scratch + omp_get_thread_num() * 2 * PANEL * (HEIGHT + rank);
#else
        float *const M = scratch;
#endif
        float *const V = M + HEIGHT * PANEL, *const panel = V + HEIGHT * PANEL, *const other = panel + PANEL * rank;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < t->count * bands; item++) {
            const int64_t n = item / bands, i0 = item % bands * HEIGHT, h = min(HEIGHT, t->rows - i0);
            const int skipped = t->finite && !t->finite[n];
            for (int64_t j0 = 0; j0 < t->columns; j0 += PANEL) {
                const int64_t width = min(PANEL, t->columns - j0);
                float squares[PANEL] = {0}, column[PANEL] = {0};
                if (skipped) {
                    if (column_sums) memset(parts + item * t->columns + j0, 0, (size_t)width * 4);
                    continue;
                }
                if (first->kind == FACTORS) moment_product(first, n, i0, h, j0, width, panel, M);
                if (second->kind != DENSE) moment_product(second, n, i0, h, j0, width, other, V);
                if (second->column) memcpy(column, second->column[n] + j0, (size_t)width * 4);
                for (int64_t i = 0; i < h; i++) {
                    float g[PANEL], square[PANEL], x[PANEL];
                    float *const m = M + i * PANEL, *const v = V + i * PANEL;
                    /* The hardware does not foresee the step to the next panel. */
                    prefetch(t->data[n], t->dtype, (i0 + i) * t->stride + j0 + PANEL);
                    prefetch(w->data[n], w->dtype, (i0 + i) * w->stride + j0 + PANEL);
                    load_gradient(t, n, i0 + i, j0, width, PANEL, g);
                    for (int k = 0; k < PANEL; k++) square[k] = g[k] * g[k];
                    if (column_sums)
                        for (int k = 0; k < PANEL; k++) squares[k] += square[k];
                    if (row_sums) {
                        vec total = {0};
                        for (int k = 0; k < VECTORS; k++) total += *(const vec *)(square + k * LANES);
                        float sum = 0;
                        for (int k = 0; k < LANES; k++) sum += total[k];
                        row_sums[n * t->rows + i0 + i] += sum;
                    }
                    if (first->kind == DENSE) dense(first, n, i0 + i, j0, width, g, m);
                    else if (second->kind != SPLIT)
                        for (int k = 0; k < PANEL; k++) m[k] = first->keep[n] * m[k] + first->fresh[n] * g[k];
                    if (second->kind == DENSE) dense(second, n, i0 + i, j0, width, square, v);
                    else if (second->kind == SPLIT) {
                        const float kept = second->keep[n] * (1 - second->share), held = second->keep[n] * second->share;
                        const float row = second->row[n][i0 + i], fresh = second->fresh[n];
                        const float keep_m = first->keep[n], fresh_m = first->fresh[n];
                        for (int k = 0; k < PANEL; k++) {
                            /* Weighed before they are squared: a square may be infinite, and a weight zero. */
                            const float of_m = (kept * m[k]) * m[k], of_h = (held * v[k]) * v[k];
                            const float part = m[k] - v[k];
                            v[k] = of_m + of_h + fresh * square[k] + row * column[k];
                            m[k] = keep_m * part + fresh_m * g[k];
                        }
                    } else {
                        const float row = second->row ? second->row[n][i0 + i] : 1;
                        for (int k = 0; k < PANEL; k++) {
                            const float root = row * v[k] * (second->column ? column[k] : 1);
                            v[k] = second->keep[n] * root * root + second->fresh[n] * square[k];
                        }
                    }
                    const int64_t at = (i0 + i) * w->stride + j0;
                    load(x, address(w->data[n], w->dtype, at), w->dtype, width, PANEL);
                    const float decay = w->decay[n], lr = w->lr[n], eps = w->eps;
                    for (int k = 0; k < PANEL; k++) x[k] = decay * x[k] - lr * m[k] / (sqrtf(v[k]) + eps);
                    if (w->dtype == FLOAT32) memcpy((float *)w->data[n] + at, x, (size_t)width * 4);
                    else if (w->dtype == FLOAT16)
                        for (int64_t k = 0; k < width; k++) ((_Float16 *)w->data[n])[at + k] = (_Float16)x[k];
                    else if (w->keys) {
                        const uint32_t index = (uint32_t)((w->row0 + i0 + i) * w->width + w->column0 + j0);
                        for (int64_t k = 0; k < width; k++)
                            ((uint16_t *)w->data[n])[at + k] = noisy_bfloat16(x[k], index + (uint32_t)k, (uint32_t)w->keys[n]);
                    } else
                        for (int64_t k = 0; k < width; k++) ((uint16_t *)w->data[n])[at + k] = nearest_bfloat16(x[k]);
                }
                if (column_sums) memcpy(parts + item * t->columns + j0, squares, (size_t)width * 4);
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
