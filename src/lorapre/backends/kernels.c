/* The operations of a step of Adam on tiles of gradients, for CPUs; cpu_kernels.py compiles and calls them.

   A tile is a part (rows, columns) of each of `count` same-shaped matrices. Everything is computed in float32,
   whatever the dtype. In what order a sum is formed depends on the shape and on the width of the processor's vectors,
   never on the number of threads. Each thread takes a part of the matrices, the same in all functions and nearly that
   of torch's operations: what is in its cache mostly is what it needs next.

   Products are made as in BLIS (Van Zee, van de Geijn 2015): a block of ROWS x VECTORS vectors of the result stays
   in registers while one operand is read a number at a time and the other, packed, a panel row at a time. Of bfloat16
   gradients two terms of a sum lie in the place of one float32, as processors that can multiply bfloat16 take them. */

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

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
    DEPTH = 128,             /* terms of a sum added up before they join the rest: a panel fits the first cache */
    HEIGHT = 128,            /* rows that a thread takes, for whose products a panel is packed once */
    SPAN = 8 * PANEL,        /* columns that a thread takes in `column_products` */
    WIDTH = 8 * PANEL,       /* and in `products` */
    NARROW = 16,             /* rows of a block of a root */
    BAND = 32,               /* rows of a gradient that `adam` works on at a time */
};

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float held __attribute__((vector_size(4 * LANES))); /* in registers; `vec` is in memory, of any alignment */
typedef int32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ALIGNED __attribute__((aligned(64)))

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { FACTORS, DENSE, SPLIT };
enum { NUMBERS, PAIRS };

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

INLINE const void *address(const void *data, int64_t dtype, int64_t index) {
    return (const char *)data + index * (dtype == FLOAT32 ? 4 : 2);
}

/* PANEL numbers that are read soon: the hardware does not foresee the step to another panel. */
INLINE void prefetch(const char *data) {
    UNROLL for (int k = 0; k < VECTORS; k++) __builtin_prefetch(data + 64 * k);
}

/* One number of a dtype, as float32. */
INLINE float number(const int dtype, const void *data, int64_t index) {
    if (dtype == FLOAT32) return ((const float *)data)[index];
    if (dtype == BFLOAT16) return bits_to_float((uint32_t)((const uint16_t *)data)[index] << 16);
    return (float)((const _Float16 *)data)[index];
}

INLINE void load_lines(const int dtype, const int64_t n, const float sign, const int absolute, float *to,
                       int64_t to_line, const void *from, int64_t line, int64_t lines) {
    for (int64_t i = 0; i < lines; i++)
        for (int64_t j = 0; j < n; j++) {
            const float x = sign * number(dtype, from, i * line + j);
            to[i * to_line + j] = absolute ? fabsf(x) : x;
        }
}

INLINE void load_any(const int dtype, int64_t n, float sign, int absolute, float *to, int64_t to_line, const void *from,
                     int64_t line, int64_t lines) {
    /* Much faster for constants. */
    if (n == PANEL && sign == 1 && !absolute) load_lines(dtype, PANEL, 1, 0, to, to_line, from, line, lines);
    else load_lines(dtype, n, sign, absolute, to, to_line, from, line, lines);
}

/* (h, n) of a gradient from row i and column j on or its absolute value, in lines `to_line` apart that zeros fill up to
   `count`. */
static void load_gradient(const Tile *t, int64_t matrix, int64_t i, int64_t h, int64_t j, int64_t n, int absolute,
                          float *to, int64_t to_line, int64_t count) {
    const int zero = t->finite && !t->finite[matrix];
    const void *const from = address(t->data[matrix], t->dtype, i * t->stride + j);
    if (zero) n = 0;
    else if (t->dtype == FLOAT32) load_any(FLOAT32, n, t->sign, absolute, to, to_line, from, t->stride, h);
    else if (t->dtype == BFLOAT16) load_any(BFLOAT16, n, t->sign, absolute, to, to_line, from, t->stride, h);
    else load_any(FLOAT16, n, t->sign, absolute, to, to_line, from, t->stride, h);
    for (int64_t k = 0; n < count && k < h; k++) memset(to + k * to_line + n, 0, (size_t)(count - n) * 4);
}

/* Where the numbers, or pairs, that `load_gradient` and `load_row_pairs` would load lie already, or NULL. */
INLINE const float *as_it_is(const Tile *t, int64_t matrix, int64_t i, int64_t j, int64_t n, int absolute) {
    const char *const from = address(t->data[matrix], t->dtype, i * t->stride + j);
    if (t->sign != 1 || absolute || (t->finite && !t->finite[matrix])) return NULL;
    const int whole = n % 2 == 0 && t->stride % 2 == 0 && (uintptr_t)from % 4 == 0; /* pairs where float32 may lie */
    return t->dtype == FLOAT32 || (t->dtype == BFLOAT16 && whole) ? (const float *)(const void *)from : NULL;
}

/* LANES x LANES numbers, mirrored at the diagonal, of lines `from_line` and `to_line` apart. */
INLINE void transpose(float *to, int64_t to_line, const float *from, int64_t from_line) {
#ifdef __clang__ /* it has no __builtin_shuffle */
    for (int64_t i = 0; i < LANES; i++)
        for (int64_t k = 0; k < LANES; k++) to[k * to_line + i] = from[i * from_line + k];
#else
    typedef int32_t places __attribute__((vector_size(4 * LANES)));
    places low, high;
    UNROLL for (int k = 0; k < LANES; k++) {
        low[k] = k / 2 + k % 2 * LANES;
        high[k] = low[k] + LANES / 2;
    }
    vec x[LANES], y[LANES];
    UNROLL for (int i = 0; i < LANES; i++) x[i] = *(const vec *)(from + i * from_line);
    UNROLL for (int size = 1; size < LANES; size *= 2) { /* riffle halves, of lines and of numbers */
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + LANES / 2], low);
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + LANES / 2], high);
        }
        UNROLL for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
    UNROLL for (int i = 0; i < LANES; i++) *(vec *)(to + i * to_line) = x[i];
#endif
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
        for (int64_t k0 = 0; k0 < K; k0 += LANES)
            for (int64_t j0 = 0; j0 < width; j0 += LANES)
                if (row == 1 && k0 + LANES <= K && j0 + LANES <= n)
                    transpose(to + k0 * width + j0, width, from + k0 + j0 * column, column);
                else
                    for (int64_t j = j0; j < j0 + LANES; j++)
                        for (int64_t k = k0; k < min(k0 + LANES, K); k++)
                            to[k * width + j] = j < n ? from[k * row + j * column] : 0;
}

/* sum + x y of pairs, one of x and LANES of y: two products in each place. */
INLINE held add_pairs(held sum, const float *x, held y) {
    int32_t bits; /* no arithmetic may touch them as a float */
    memcpy(&bits, x, 4);
    const words pair = (words){0} + bits;
#ifdef __AVX512BF16__
    return (held)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)y);
#else
    const words high = (words){0} + (int32_t)0xFFFF0000;
    return sum + (held)(pair << 16) * (held)((words)y << 16) + (held)(pair & high) * (held)((words)y & high);
#endif
}

/* c[i][j] (+)= sum over k < K of a[i * row + k * step] b[k][j], for `rows` x `vectors` LANES, constants as `kind` is.
   Sums are added to what is there at the end, so that errors of long ones in parts do not grow with their length. */
INLINE void block(const int kind, const int rows, const int vectors, int64_t K, const float *a, int64_t row,
                  int64_t step, const float *b, float *c, int64_t c_stride, int add) {
    held sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = (held){0};
    for (int64_t k = 0; k < K; k++, a += step, b += vectors * LANES) {
        held y[VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) y[j] = *(const vec *)(b + j * LANES);
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int j = 0; j < vectors; j++) {
                if (kind == PAIRS) sum[i][j] = add_pairs(sum[i][j], a + i * row, y[j]);
                else sum[i][j] += a[i * row] * y[j];
            }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) {
            vec *const to = (vec *)(c + i * c_stride + j * LANES);
            if (add) sum[i][j] += *to;
            *to = sum[i][j];
        }
}

INLINE void rows_of_blocks(const int kind, int64_t rows, const int vectors, int64_t K, const float *a, int64_t row,
                           int64_t step, const float *b, float *c, int64_t c_stride, int add) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        block(kind, ROWS, vectors, K, a + i * row, row, step, b, c + i * c_stride, c_stride, add);
    for (; i < rows; i++) block(kind, 1, vectors, K, a + i * row, row, step, b, c + i * c_stride, c_stride, add);
}

INLINE void product_of(const int kind, int64_t rows, int64_t vectors, int64_t K, const float *a, int64_t row,
                       int64_t step, const float *b, float *c, int64_t c_stride, int add) {
    if (vectors == 1) rows_of_blocks(kind, rows, 1, K, a, row, step, b, c, c_stride, add);
    else if (vectors == 2) rows_of_blocks(kind, rows, 2, K, a, row, step, b, c, c_stride, add);
    else rows_of_blocks(kind, rows, 3, K, a, row, step, b, c, c_stride, add);
}

static void product(int64_t rows, int64_t vectors, int64_t K, const float *a, int64_t row, int64_t step,
                    const float *b, float *c, int64_t c_stride, int add) {
    product_of(NUMBERS, rows, vectors, K, a, row, step, b, c, c_stride, add);
}

static void product_of_pairs(int64_t rows, int64_t vectors, int64_t K, const float *a, int64_t row, int64_t step,
                             const float *b, float *c, int64_t c_stride, int add) {
    product_of(PAIRS, rows, vectors, K, a, row, step, b, c, c_stride, add);
}

/* n pairs of two rows of numbers, of which the second may be NULL for zeros, rounded to bfloat16. */
INLINE void fold(float *to, const float *first, const float *second, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        const uint32_t low = nearest_bfloat16(first[j]), high = second ? nearest_bfloat16(second[j]) : 0;
        to[j] = bits_to_float(low | high << 16);
    }
}

/* `load_gradient` of bfloat16, in pairs of numbers next to each other (h, n / 2) in lines of DEPTH. */
static void load_row_pairs(const Tile *t, int64_t matrix, int64_t i, int64_t h, int64_t j, int64_t n, int absolute,
                           float *to) {
    const uint32_t flip = t->sign < 0 && !absolute ? 0x80008000 : 0, keep = absolute ? 0x7FFF7FFF : 0xFFFFFFFF;
    const int zero = t->finite && !t->finite[matrix];
    for (int64_t k = 0; k < h; k++, to += DEPTH) {
        const uint16_t *const from = (const uint16_t *)t->data[matrix] + (i + k) * t->stride + j;
        for (int64_t l = 0; l < n / 2; l++) {
            uint32_t pair;
            memcpy(&pair, from + 2 * l, 4);
            to[l] = bits_to_float(zero ? 0 : (pair ^ flip) & keep);
        }
        if (n % 2) to[n / 2] = bits_to_float(zero ? 0 : ((from[n - 1] ^ flip) & keep) & 0xFFFF);
    }
}

/* The same in pairs of numbers below each other, (h / 2, PANEL). */
INLINE void load_column_pairs(const Tile *t, int64_t matrix, int64_t i, int64_t h, int64_t j, const int64_t n,
                              int absolute, float *to) {
    const uint32_t flip = t->sign < 0 && !absolute ? 0x80008000 : 0, keep = absolute ? 0x7FFF7FFF : 0xFFFFFFFF;
    const int zero = t->finite && !t->finite[matrix];
    for (int64_t k = 0; k < h; k += 2, to += PANEL) {
        const uint16_t *const from = (const uint16_t *)t->data[matrix] + (i + k) * t->stride + j;
        const uint16_t *const below = k + 1 < h ? from + t->stride : NULL;
        for (int64_t l = 0; l < n; l++) {
            const uint32_t pair = from[l] | (below ? (uint32_t)below[l] << 16 : 0);
            to[l] = bits_to_float(zero ? 0 : (pair ^ flip) & keep);
        }
        for (int64_t l = n; l < PANEL; l++) to[l] = 0;
    }
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

/* out (count, rows, rank) = T P^T with P (rank, columns) of each, T the gradient or its absolute value. P is rounded to
   bfloat16 if the gradient is. */
void row_products(const Tile *t, const float *const *P, int64_t P_stride, int64_t rank, int64_t absolutes, float *out,
                  float *scratch) {
    const int64_t parts = blocks(t->columns, DEPTH), full = padded(rank);
    const int64_t bands = blocks(t->rows, HEIGHT);
    const int pairs = t->dtype == BFLOAT16;
    float *const packed = scratch, *const space = scratch + t->count * t->columns * full;
#pragma omp parallel num_threads((int)t->threads)
    {
        /* P^T by panels: of each part of the columns and each group of ranks (columns, vectors LANES). */
#pragma omp for schedule(static)
        for (int64_t item = 0; item < t->count * parts; item++) {
            const int64_t n = item / parts, j0 = item % parts * DEPTH, w = min(DEPTH, t->columns - j0);
            for (int64_t k0 = 0; k0 < rank; k0 += PANEL) {
                float *const to = packed + (n * t->columns + j0) * full + k0 * w;
                const int64_t vectors = min(VECTORS, (full - k0) / LANES), width = vectors * LANES;
                pack(to, P[n] + k0 * P_stride + j0, 1, P_stride, w, min(PANEL, rank - k0), vectors);
                for (int64_t j = 0; pairs && j < w; j += 2)
                    fold(to + j / 2 * width, to + j * width, j + 1 < w ? to + (j + 1) * width : NULL, width);
            }
        }
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < t->count * bands; item++) {
            const int64_t n = item / bands, i0 = item % bands * HEIGHT, h = min(HEIGHT, t->rows - i0);
            float *const tile = space + thread() * HEIGHT * (DEPTH + full);
            float *const to = out + (n * t->rows + i0) * rank, *const sums = full == rank ? to : tile + HEIGHT * DEPTH;
            if (t->columns == 0) memset(sums, 0, (size_t)(h * full) * 4);
            for (int64_t j0 = 0; j0 < t->columns; j0 += DEPTH) {
                const int64_t w = min(DEPTH, t->columns - j0);
                const float *from = as_it_is(t, n, i0, j0, w, absolutes != 0);
                const int64_t line = from ? t->stride / (1 + pairs) : DEPTH;
                if (!from) {
                    if (pairs) load_row_pairs(t, n, i0, h, j0, w, absolutes != 0, tile);
                    else load_gradient(t, n, i0, h, j0, w, absolutes != 0, tile, DEPTH, w);
                    from = tile;
                }
                for (int64_t k0 = 0; k0 < full; k0 += PANEL)
                    (pairs ? product_of_pairs : product)(
                        h, min(VECTORS, (full - k0) / LANES), pairs ? (w + 1) / 2 : w, from, line, 1,
                        packed + (n * t->columns + j0) * full + k0 * w, sums + k0, full, j0 > 0);
            }
            for (int64_t i = 0; sums != to && i < h; i++) memcpy(to + i * rank, sums + i * full, (size_t)rank * 4);
        }
    }
}

/* Floats of scratch space that `column_products` wants. */
int64_t column_products_scratch(int64_t count, int64_t rows, int64_t dtype, int64_t rank, int64_t threads) {
    return threads * SPAN * (HEIGHT + rank) + (dtype == BFLOAT16 ? count * blocks(rows, 2) * rank : 0);
}

/* out (count, rank, columns) = L^T T with L (rows, rank) of each, T the gradient or its absolute value. L is rounded to
   bfloat16 if the gradient is. */
void column_products(const Tile *t, const float *const *L, int64_t L_stride, int64_t L_step, int64_t rank,
                     int64_t absolutes, float *out, float *scratch) {
    const int64_t spans = blocks(t->columns, SPAN), half = blocks(t->rows, 2);
    const int pairs = t->dtype == BFLOAT16;
    float *const folded = scratch + t->threads * SPAN * (HEIGHT + rank);
#pragma omp parallel num_threads((int)t->threads)
    {
        float *const tile = scratch + thread() * SPAN * (HEIGHT + rank);
        float *const sums = tile + SPAN * HEIGHT; /* (rank, PANEL) of each panel */
        if (pairs) {
#pragma omp for schedule(static)
            for (int64_t item = 0; item < t->count * half; item++) {
                const float *const first = L[item / half] + item % half * 2 * L_stride;
                const float *const second = item % half * 2 + 1 < t->rows ? first + L_stride : NULL;
                if (L_step == 1) fold(folded + item * rank, first, second, rank);
                else
                    for (int64_t k = 0; k < rank; k++)
                        fold(folded + item * rank + k, first + k * L_step, second ? second + k * L_step : NULL, 1);
            }
        }
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < t->count * spans; item++) {
            const int64_t n = item / spans, j0 = item % spans * SPAN, w = min(SPAN, t->columns - j0);
            const int64_t panels = blocks(w, PANEL);
            for (int64_t i0 = 0; i0 < t->rows; i0 += HEIGHT) {
                const int64_t h = min(HEIGHT, t->rows - i0);
                for (int64_t panel = 0, j = 0; panel < panels; panel++, j += PANEL) {
                    float *const to = tile + j * HEIGHT, *const sum = sums + j * rank;
                    const int64_t n_columns = min(PANEL, w - j);
                    if (!pairs) {
                        load_gradient(t, n, i0, h, j0 + j, n_columns, absolutes != 0, to, PANEL, PANEL);
                        product(rank, VECTORS, h, L[n] + i0 * L_stride, L_step, L_stride, to, sum, PANEL, i0 > 0);
                        continue;
                    }
                    if (n_columns == PANEL) load_column_pairs(t, n, i0, h, j0 + j, PANEL, absolutes != 0, to);
                    else load_column_pairs(t, n, i0, h, j0 + j, n_columns, absolutes != 0, to);
                    product_of_pairs(rank, VECTORS, (h + 1) / 2, folded + (n * half + i0 / 2) * rank, 1, rank, to, sum,
                                     PANEL, i0 > 0);
                }
            }
            if (t->rows == 0) memset(sums, 0, (size_t)(rank * SPAN) * 4);
            for (int64_t j = 0; j < w; j += PANEL)
                for (int64_t k = 0; k < rank; k++)
                    memcpy(out + (n * rank + k) * t->columns + j0 + j, sums + j * rank + k * PANEL,
                           (size_t)min(PANEL, w - j) * 4);
        }
    }
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

/* Sums of g^2 over rows (h, LANES), in LANES parts, and columns (PANEL) are added to those there. */
static void add_squares(const float *g, int64_t h, float *of_rows, float *of_columns) {
    vec sum[VECTORS] = {0};
    for (int64_t i = 0; i < h; i++, g += PANEL, of_rows += LANES) {
        vec total = *(const vec *)of_rows;
        UNROLL for (int k = 0; k < VECTORS; k++) {
            const vec x = *(const vec *)(g + k * LANES);
            total += x * x;
            sum[k] += x * x;
        }
        *(vec *)of_rows = total;
    }
    UNROLL for (int k = 0; k < VECTORS; k++) *(vec *)(of_columns + k * LANES) += sum[k];
}

/* A dense moment, the EMA of g (h, PANEL) or, the second, of g^2, updated in place and taken divided by the correction.
   In it, i and j are row and column of the first, and w is the number of columns. */
static void dense(const Moment *m, const int second, int64_t n, int64_t i, int64_t h, int64_t j, int64_t w,
                  const float *g, float *to) {
    const float fresh = m->share, correction = m->keep[n];
    for (; h > 0; h--, i++, g += PANEL, to += PANEL) {
        float *const ema = m->B[n] + i * m->B_stride + j;
        for (int64_t k = 0; k < w; k++) {
            /* No difference: a square may be infinite, and the EMA then is for good. */
            const float part = second ? fresh * g[k] * g[k] : fresh * g[k];
            ema[k] = (1 - fresh) * ema[k] + part;
            to[k] = ema[k] / correction;
        }
        for (int64_t k = w; k < PANEL; k++) to[k] = 0;
    }
}

/* keep m + fresh g, in place. */
static void first_moment(float keep, float fresh, int64_t h, const float *g, float *m) {
    for (int64_t k = 0; k < h * PANEL; k++) m[k] = keep * m[k] + fresh * g[k];
}

/* keep (row v column)^2 + fresh g^2, in place; `row` may be NULL. */
static void second_moment(float keep, float fresh, const float *row, const float *column, int64_t h, const float *g,
                          float *v) {
    for (int64_t i = 0; i < h; i++, g += PANEL, v += PANEL) {
        const float scale = row ? row[i] : 1;
        for (int k = 0; k < PANEL; k++) {
            const float root = scale * v[k] * column[k];
            v[k] = keep * root * root + fresh * g[k] * g[k];
        }
    }
}

/* Both moments of SPLIT, in place of B A in m and C W in v. */
static void split_moments(const Moment *first, const Moment *second, int64_t n, const float *row, const float *column,
                          int64_t h, const float *g, float *m, float *v) {
    const float kept = second->keep[n] * (1 - second->share), held = second->keep[n] * second->share;
    const float fresh = second->fresh[n], keep_m = first->keep[n], fresh_m = first->fresh[n];
    for (int64_t i = 0; i < h; i++, g += PANEL, m += PANEL, v += PANEL)
        for (int k = 0; k < PANEL; k++) {
            /* Weighed before they are squared: a square may be infinite, and a weight zero. */
            const float of_m = (kept * m[k]) * m[k], of_h = (held * v[k]) * v[k], part = m[k] - v[k];
            v[k] = of_m + of_h + fresh * g[k] * g[k] + row[i] * column[k];
            m[k] = keep_m * part + fresh_m * g[k];
        }
}

INLINE void update_lines(const Tile *t, const Weights *w, const int dtype, const int noisy, const int64_t width,
                         int64_t n, int64_t i, int64_t h, int64_t j, const float *m, const float *v) {
    const float decay = w->decay[n], lr = w->lr[n], eps = w->eps;
    const uint32_t key = noisy ? (uint32_t)w->keys[n] : 0;
    for (; h > 0; h--, i++, m += PANEL, v += PANEL) {
        void *const x = (void *)address(w->data[n], dtype, i * w->stride + j);
        prefetch(address(w->data[n], dtype, i * w->stride + j + PANEL));
        prefetch(address(t->data[n], dtype, i * t->stride + j + PANEL));
        const uint32_t index = (uint32_t)((w->row0 + i) * w->width + w->column0 + j);
        for (int64_t k = 0; k < width; k++) {
            const float new = decay * number(dtype, x, k) - lr * m[k] / (sqrtf(v[k]) + eps);
            if (dtype == FLOAT32) ((float *)x)[k] = new;
            else if (dtype == FLOAT16) ((_Float16 *)x)[k] = (_Float16)new;
            else if (noisy) ((uint16_t *)x)[k] = noisy_bfloat16(new, index + (uint32_t)k, key);
            else ((uint16_t *)x)[k] = nearest_bfloat16(new);
        }
    }
}

INLINE void update_any(const Tile *t, const Weights *w, const int dtype, const int noisy, int64_t width, int64_t n,
                       int64_t i, int64_t h, int64_t j, const float *m, const float *v) {
    if (width == PANEL) update_lines(t, w, dtype, noisy, PANEL, n, i, h, j, m, v);
    else update_lines(t, w, dtype, noisy, width, n, i, h, j, m, v);
}

/* (h, width) of weights, from row i and column j on. */
static void update(const Tile *t, const Weights *w, int64_t width, int64_t n, int64_t i, int64_t h, int64_t j,
                   const float *m, const float *v) {
    if (w->dtype == FLOAT32) update_any(t, w, FLOAT32, 0, width, n, i, h, j, m, v);
    else if (w->dtype == FLOAT16) update_any(t, w, FLOAT16, 0, width, n, i, h, j, m, v);
    else if (w->keys) update_any(t, w, BFLOAT16, 1, width, n, i, h, j, m, v);
    else update_any(t, w, BFLOAT16, 0, width, n, i, h, j, m, v);
}

/* Floats of scratch space that `adam` wants, sums of columns in parts included. */
int64_t adam_scratch(int64_t count, int64_t rows, int64_t columns, int64_t threads, int64_t sums) {
    const int64_t parts = sums ? count * blocks(rows, HEIGHT) * columns : 0;
    return threads * (PANEL * (2 * HEIGHT + BAND + DEPTH) + HEIGHT * LANES) + parts;
}

/* Weights <- decay weights - lr m / (sqrt(v) + eps); sums of g^2 over rows (count, rows) and columns
   (count, columns) are added to `row_sums` and `column_sums`, unless these are NULL. */
void adam(const Tile *t, const Weights *w, const Moment *first, const Moment *second, float *row_sums,
          float *column_sums, float *scratch) {
    const int64_t bands = blocks(t->rows, HEIGHT), space = PANEL * (2 * HEIGHT + BAND + DEPTH) + HEIGHT * LANES;
    float *const parts = scratch + t->threads * space;
#pragma omp parallel num_threads((int)t->threads)
    {
        float *const M = scratch + thread() * space, *const V = M + HEIGHT * PANEL, *const G = V + HEIGHT * PANEL;
        float *const panel = G + BAND * PANEL;
        float *const of_rows = panel + DEPTH * PANEL; /* a vector of partial sums for each row */
#pragma omp for schedule(static)
        for (int64_t item = 0; item < t->count * bands; item++) {
            const int64_t n = item / bands, i0 = item % bands * HEIGHT, h = min(HEIGHT, t->rows - i0);
            const int skipped = t->finite && !t->finite[n];
            memset(of_rows, 0, HEIGHT * LANES * 4);
            for (int64_t j0 = 0; j0 < t->columns; j0 += PANEL) {
                const int64_t width = min(PANEL, t->columns - j0);
                float squares[PANEL] ALIGNED = {0}, column[PANEL] ALIGNED = {0};
                if (first->kind == FACTORS && !skipped) moment_product(first, n, i0, h, j0, width, panel, M);
                if (second->kind != DENSE && !skipped) moment_product(second, n, i0, h, j0, width, panel, V);
                for (int64_t k = 0; k < width; k++) column[k] = second->column ? second->column[n][j0 + k] : 1;
                for (int64_t i = 0; i < h && !skipped; i += BAND) {
                    const int64_t few = min(BAND, h - i), at = i0 + i;
                    const float *const row = second->row ? second->row[n] + at : NULL;
                    float *const m = M + i * PANEL, *const v = V + i * PANEL;
                    load_gradient(t, n, at, few, j0, width, 0, G, PANEL, PANEL);
                    if (row_sums) add_squares(G, few, of_rows + i * LANES, squares);
                    if (first->kind == DENSE) dense(first, 0, n, at, few, j0, width, G, m);
                    else if (second->kind != SPLIT) first_moment(first->keep[n], first->fresh[n], few, G, m);
                    if (second->kind == DENSE) dense(second, 1, n, at, few, j0, width, G, v);
                    else if (second->kind == SPLIT) split_moments(first, second, n, row, column, few, G, m, v);
                    else second_moment(second->keep[n], second->fresh[n], row, column, few, G, v);
                    update(t, w, width, n, at, few, j0, m, v);
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
        float *const panel = scratch + thread() * (DEPTH * PANEL + HEIGHT * WIDTH);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < count * bands * groups; item++) {
            const int64_t n = item / (bands * groups), i0 = item / groups % bands * height, h = min(height, a - i0);
            const int64_t first = item % groups * width, last = min(first + width, c);
            float *const to = out + (n * a + i0) * c + first;
            float *const sums = c % LANES ? panel + DEPTH * PANEL : to; /* of whole vectors */
            const int64_t line = c % LANES ? WIDTH : c;
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
                                sums + i * line + j0 - first, line, k0 > 0);
                    }
                }
            for (int64_t i = 0; sums != to && i < h; i++)
                memcpy(to + i * c, sums + i * line, (size_t)(last - first) * 4);
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

/* out (count, r, q) = A + scale waves, of the columns from `first` on: wave k is the sine of 2 pi frac(sqrt(2) k) times
   the number of the column, both counted from one. `turns` holds 2 r doubles. */
void add_waves(int64_t count, int64_t r, int64_t q, const float *A, const int64_t *strides, int64_t first, float scale,
               float *out, int64_t threads, double *turns) {
    for (int64_t k = 0; k < r; k++) {
        const double angle = sqrt(2) * (double)(k + 1), turn = 2 * M_PI * (angle - floor(angle));
        turns[2 * k] = turn;
        turns[2 * k + 1] = fmod(turn * (double)(first + 1), 2 * M_PI);
    }
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t item = 0; item < count * r; item++) {
        const int64_t n = item / r, k = item % r;
        const float *const from = A + n * strides[0] + k * strides[1];
        float *const to = out + item * q;
        float sine[LANES], cosine[LANES];
        const double turn = turns[2 * k], start = turns[2 * k + 1], s = sin(turn), c = cos(turn);
        double x = sin(start), y = cos(start);
        for (int l = 0; l < LANES; l++) {
            sine[l] = (float)x * scale;
            cosine[l] = (float)y * scale;
            const double next = x * c + y * s;
            y = y * c - x * s;
            x = next;
        }
        const float S = (float)sin(LANES * turn), C = (float)cos(LANES * turn);
        for (int64_t j = 0; j < q; j += LANES) {
            for (int64_t l = 0; l < min(LANES, q - j); l++) to[j + l] = from[j + l] + sine[l];
            for (int l = 0; l < LANES; l++) {
                const float next = sine[l] * C + cosine[l] * S;
                cosine[l] = cosine[l] * C - sine[l] * S;
                sine[l] = next;
            }
        }
    }
}

enum { CHUNK = 1 << 14 };

/* Numbers of scratch space that `gauge` wants. */
int64_t gauge_scratch(int64_t count, int64_t a) { return count * blocks(a, CHUNK); }

/* A (count, a) is divided, and B (count, b) multiplied, by such numbers that the norm of A becomes `norm`. Where there
   is none, B becomes zero and A what it was `before` or, if that is NULL, one in every `step`-th place and zero. */
void gauge(int64_t count, int64_t b, int64_t a, float norm, float *B, float *A, const float *before, int64_t step,
           int64_t threads, double *scratch) {
    typedef double wide __attribute__((vector_size(8 * LANES)));
    const int64_t parts = blocks(a, CHUNK), all = parts + blocks(b, CHUNK);
#pragma omp parallel num_threads((int)threads)
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < count * parts; item++) {
            const int64_t start = item % parts * CHUNK, n = min(CHUNK, a - start);
            const float *const x = A + item / parts * a + start;
            wide sums = {0};
            double sum = 0;
            int64_t j = 0;
            for (; j + LANES <= n; j += LANES) {
                const wide y = __builtin_convertvector(*(const vec *)(x + j), wide);
                sums += y * y;
            }
            for (; j < n; j++) sum += (double)x[j] * x[j];
            for (int l = 0; l < LANES; l++) sum += sums[l];
            scratch[item] = sum;
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < count * all; item++) {
            const int64_t n = item / all, part = item % all;
            double sum = 0;
            for (int64_t k = 0; k < parts; k++) sum += scratch[n * parts + k];
            const float size = (float)(sqrt(sum) / norm);
            const int alive = size >= FLT_MIN && size <= FLT_MAX;
            if (part < parts) {
                const int64_t last = min((part + 1) * CHUNK, a);
                float *const x = A + n * a;
                const float inverse = 1 / size;
                for (int64_t j = part * CHUNK; j < last && alive; j++) x[j] *= inverse;
                for (int64_t j = part * CHUNK; j < last && !alive; j++)
                    x[j] = before ? before[n * a + j] : (float)(j % step == 0);
            } else {
                const int64_t last = min((part - parts + 1) * CHUNK, b);
                float *const x = B + n * b;
                for (int64_t j = (part - parts) * CHUNK; j < last; j++) x[j] = alive ? x[j] * size : 0;
            }
        }
    }
}
