/* The three primitives of a step on CPUs: products with the gradient, other products, and the update of the weights.

   library.py compiles this file, c.py calls it and checks everything that it hands over. All arithmetic is float32,
   whatever the dtype of the operands. In what order a sum is formed depends on the shape and on the width of the
   processor's vectors, never on the number of threads.

   Products are made as in BLIS (Van Zee, van de Geijn 2015): a block of ROWS x VECTORS vectors of the result stays in
   registers while one operand is read a number at a time and the other, packed into panels, a row at a time. Of two
   bfloat16 operands, two terms of a sum lie in the place of one float32, as processors that multiply bfloat16 take
   them. */

#include <math.h>
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
    PANEL = VECTORS * LANES, /* columns of a block */
    DEPTH = 128,             /* terms of a sum that are added up before they join the rest: a panel fits the L1 cache */
    TALL = 64,               /* rows of the left operand that meet a panel at a time */
    WIDTH = 8 * PANEL,       /* columns of the right operand that are packed at a time, at most: they fit the L2 cache */
    HEIGHT = 128,            /* rows of B A that `step` holds */
    SOME = 8,                /* rows that `inverse_roots` takes at a time */
    BAND = 32,               /* rows of a gradient that `step` holds */
};

typedef float vec __attribute__((vector_size(4 * LANES)));                /* in a register */
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4))); /* in memory, at any address */
typedef int32_t words __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ALIGNED __attribute__((aligned(64)))

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* Same-shaped matrices. Strides count elements. */
typedef struct {
    void *const *data; /* an address for each */
    int64_t row, column, dtype, absolute;
} Matrices;

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t blocks(int64_t length, int64_t size) { return (length + size - 1) / size; }

/* PANEL numbers that are read soon: the hardware does not foresee the step to another panel. */
INLINE void prefetch(const void *data) {
    UNROLL for (int k = 0; k < VECTORS; k++) __builtin_prefetch((const char *)data + 64 * k);
}

INLINE float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

INLINE const void *element(const Matrices *x, int64_t n, int64_t i, int64_t j) {
    return (const char *)x->data[n] + (i * x->row + j * x->column) * (x->dtype == FLOAT32 ? 4 : 2);
}

/* float16 is converted in integers: before GCC 12, x86 has no _Float16. */
INLINE float half_to_float(uint16_t half) {
    const uint32_t bits = (uint32_t)(half & 0x7FFF) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t finite = float_to_bits(bits_to_float(bits) * 0x1p112f), special = bits | 0x7F800000;
    return bits_to_float(sign | ((half & 0x7C00) == 0x7C00 ? special : finite));
}

INLINE uint16_t nearest_half(float x) {
    const uint32_t sign = float_to_bits(x) >> 16 & 0x8000, bits = float_to_bits(x) & 0x7FFFFFFF;
    const uint32_t small = float_to_bits(bits_to_float(bits) + 0.5f) - 0x3F000000; /* 0.5 has the ulp of subnormals */
    const uint32_t rounded = (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
    const uint32_t large = bits > 0x7F800000 ? 0x7E00 : rounded > 0x7C00 ? 0x7C00 : rounded;
    return (uint16_t)(sign | (bits < 0x38800000 ? small : large));
}

INLINE uint16_t nearest_bfloat16(float x) {
    const uint32_t bits = float_to_bits(x), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(x != x ? bits >> 16 | 0x40 : rounded);
}

/* Bit for bit `round_` of rounding.py. */
INLINE uint16_t noisy_bfloat16(float x, uint32_t index, uint32_t key) {
    uint32_t h = (index * 0x9E3779B1u) ^ key;
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    h ^= h >> 16;
    const uint32_t bits = float_to_bits(x), rounded = (bits + (h & 0xFFFF)) >> 16;
    const uint32_t overflows = (rounded & 0x7F80) == 0x7F80; /* by a carry; it becomes the largest number */
    return (uint16_t)((bits & 0x7F800000) == 0x7F800000 ? nearest_bfloat16(x) : rounded - overflows);
}

INLINE float number(const int dtype, const void *data, int64_t index) {
    if (dtype == FLOAT32) return ((const float *)data)[index];
    if (dtype == BFLOAT16) return bits_to_float((uint32_t)((const uint16_t *)data)[index] << 16);
    return half_to_float(((const uint16_t *)data)[index]);
}

INLINE void load_lines(const int dtype, const int64_t w, const void *from, int64_t row, int64_t h, const float scale,
                       const uint32_t keep, float *restrict to, int64_t line) {
    for (int64_t i = 0; i < h; i++)
        for (int64_t j = 0; j < w; j++)
            to[i * line + j] = bits_to_float(float_to_bits(scale * number(dtype, from, i * row + j)) & keep);
}

INLINE void load_any(const int dtype, int64_t w, const void *from, int64_t row, int64_t h, float scale, uint32_t keep,
                     float *to, int64_t line) {
    /* Much faster for constants. */
    if (w == PANEL && line == PANEL && scale == 1 && keep == ~0u) load_lines(dtype, PANEL, from, row, h, 1, ~0u, to, PANEL);
    else load_lines(dtype, w, from, row, h, scale, keep, to, line);
}

/* LANES x LANES numbers of one matrix as those of another, transposed; lines are `from_line` and `line` apart. */
INLINE void transpose(const float *from, int64_t from_line, float *to, int64_t line) {
#ifdef __clang__ /* it has no __builtin_shuffle */
    for (int64_t i = 0; i < LANES; i++)
        for (int64_t k = 0; k < LANES; k++) to[k * line + i] = from[i * from_line + k];
#else
    words low, high;
    vec x[LANES], y[LANES];
    UNROLL for (int k = 0; k < LANES; k++) {
        low[k] = k / 2 + k % 2 * LANES;
        high[k] = low[k] + LANES / 2;
        x[k] = *(const loose *)(from + k * from_line);
    }
    UNROLL for (int size = 1; size < LANES; size *= 2) { /* riffle halves, of lines and of numbers */
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + LANES / 2], low);
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + LANES / 2], high);
        }
        UNROLL for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
    UNROLL for (int i = 0; i < LANES; i++) *(loose *)(to + i * line) = x[i];
#endif
}

/* (h, w) float32 numbers `row` and `column` apart, one of these being one. */
static void load_turned(const float *from, int64_t row, int64_t column, int64_t h, int64_t w, float *to, int64_t line) {
    for (int64_t i = 0; i < h; i += LANES)
        for (int64_t j = 0; j < w; j += LANES)
            if (row == 1 && i + LANES <= h && j + LANES <= w)
                transpose(from + i + j * column, column, to + i * line + j, line);
            else
                for (int64_t k = i; k < min(i + LANES, h); k++)
                    for (int64_t l = j; l < min(j + LANES, w); l++) to[k * line + l] = from[k * row + l * column];
}

/* (h, w) numbers of matrix n from row i and column j on, times `scale`, in lines that zeros fill up. */
static void load(const Matrices *x, int64_t n, int64_t i, int64_t h, int64_t j, int64_t w, float scale, float *to,
                 int64_t line) {
    const void *const from = element(x, n, i, j);
    const uint32_t keep = x->absolute ? 0x7FFFFFFF : 0xFFFFFFFF;
    if (x->column != 1) /* float32 alone, see c.py; the transposed matrix has contiguous rows */
        load_turned(from, x->row, x->column, h, w, to, line);
    else if (x->dtype == FLOAT32) load_any(FLOAT32, w, from, x->row, h, scale, keep, to, line);
    else if (x->dtype == BFLOAT16) load_any(BFLOAT16, w, from, x->row, h, scale, keep, to, line);
    else load_any(FLOAT16, w, from, x->row, h, scale, keep, to, line);
    for (int64_t k = 0; w < line && k < h; k++) memset(to + k * line + w, 0, (size_t)(line - w) * 4);
}

/* (h, w) bfloat16 numbers as pairs of neighbours in a row, (h, w / 2), in lines of DEPTH. */
static void load_pairs(const Matrices *x, int64_t n, int64_t i, int64_t h, int64_t j, int64_t w, float *to) {
    const uint32_t keep = x->absolute ? 0x7FFF7FFF : 0xFFFFFFFF;
    for (int64_t k = 0; k < h; k++, to += DEPTH) {
        const uint16_t *const from = element(x, n, i + k, j);
        for (int64_t l = 0; l < w / 2; l++) {
            uint32_t pair;
            memcpy(&pair, from + 2 * l, 4);
            to[l] = bits_to_float(pair & keep);
        }
        if (w % 2) to[w / 2] = bits_to_float(from[w - 1] & keep);
    }
}

/* The same as pairs of neighbours in a column, (h / 2, w), in lines that zeros fill up. */
INLINE void load_column_pairs(const Matrices *x, int64_t n, int64_t i, int64_t h, int64_t j, const int64_t w, float *to,
                              int64_t line) {
    const uint32_t keep = x->absolute ? 0x7FFF7FFF : 0xFFFFFFFF;
    for (int64_t k = 0; k < h; k += 2, to += line) {
        const uint16_t *const from = element(x, n, i + k, j), *const below = k + 1 < h ? from + x->row : from;
        const uint32_t both = k + 1 < h ? keep : keep & 0xFFFF;
        for (int64_t l = 0; l < w; l++) to[l] = bits_to_float((from[l] | (uint32_t)below[l] << 16) & both);
        for (int64_t l = w; l < line; l++) to[l] = 0;
    }
}

/* Where the numbers, or pairs, that a load would make lie already, or NULL. */
INLINE const float *in_place(const Matrices *x, int64_t n, int64_t i, int64_t j, int64_t w, int pairs) {
    const void *const from = element(x, n, i, j);
    if (x->absolute || (!pairs && x->dtype != FLOAT32)) return NULL;
    return !pairs || (x->column == 1 && w % 2 == 0 && x->row % 2 == 0 && (uintptr_t)from % 4 == 0) ? from : NULL;
}

/* sum + x y of pairs, one of x and LANES of y: two products in each place. */
INLINE vec add_pairs(vec sum, const float *x, vec y) {
    int32_t bits; /* no arithmetic may touch them as a float */
    memcpy(&bits, x, 4);
    const words pair = (words){0} + bits;
#ifdef __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)y);
#else
    const words high = (words){0} + (int32_t)0xFFFF0000;
    return sum + (vec)(pair << 16) * (vec)((words)y << 16) + (vec)(pair & high) * (vec)((words)y & high);
#endif
}

/* c[i][j] (+)= sum over k < K of a[i * row + k * step] b[k][j] for `rows` x `vectors` LANES, of which the first w columns
   are stored. Sums join what is there at the end, so that errors of long ones in parts do not grow with their length. */
INLINE void block(const int pairs, const int rows, const int vectors, int64_t K, const float *a, int64_t row,
                  int64_t step, const float *b, float *c, int64_t line, int64_t w, int add) {
    vec sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = (vec){0};
    for (int64_t k = 0; k < K; k++, a += step, b += vectors * LANES) {
        vec y[VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) y[j] = *(const loose *)(b + j * LANES);
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int j = 0; j < vectors; j++) {
                if (pairs) sum[i][j] = add_pairs(sum[i][j], a + i * row, y[j]);
                else sum[i][j] += a[i * row] * y[j];
            }
    }
    float last[ROWS * PANEL] ALIGNED; /* on its way to a place that is narrower than vectors */
    const int whole = w == vectors * LANES;
    for (int64_t i = 0; !whole && add && i < rows; i++) memcpy(last + i * PANEL, c + i * line, (size_t)w * 4);
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) {
            loose *const to = (loose *)((whole ? c + i * line : last + i * PANEL) + j * LANES);
            *to = add ? sum[i][j] + *to : sum[i][j];
        }
    for (int64_t i = 0; !whole && i < rows; i++) memcpy(c + i * line, last + i * PANEL, (size_t)w * 4);
}

INLINE void rows_of_blocks(const int pairs, int64_t rows, const int vectors, int64_t K, const float *a, int64_t row,
                           int64_t step, const float *b, float *c, int64_t line, int64_t w, int add) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        block(pairs, ROWS, vectors, K, a + i * row, row, step, b, c + i * line, line, w, add);
    for (; i < rows; i++) block(pairs, 1, vectors, K, a + i * row, row, step, b, c + i * line, line, w, add);
}

INLINE void any_product(const int pairs, int64_t rows, int64_t K, const float *a, int64_t row, int64_t step,
                        const float *b, float *c, int64_t line, int64_t w, int add) {
    if (w <= LANES) rows_of_blocks(pairs, rows, 1, K, a, row, step, b, c, line, w, add);
    else if (w <= 2 * LANES) rows_of_blocks(pairs, rows, 2, K, a, row, step, b, c, line, w, add);
    else rows_of_blocks(pairs, rows, 3, K, a, row, step, b, c, line, w, add);
}

/* (rows, w) (+)= a (rows, K) b (K, w), b packed: in lines of `packed(w)`. */
static void product(int64_t rows, int64_t K, const float *a, int64_t row, int64_t step, const float *b, float *c,
                    int64_t line, int64_t w, int add) {
    any_product(0, rows, K, a, row, step, b, c, line, w, add);
}

static void product_of_pairs(int64_t rows, int64_t K, const float *a, int64_t row, int64_t step, const float *b,
                             float *c, int64_t line, int64_t w, int add) {
    any_product(1, rows, K, a, row, step, b, c, line, w, add);
}

INLINE int64_t packed(int64_t w) { return blocks(w, LANES) * LANES; }

/* out (count, a, c) = X Y of X (count, a, b) and Y (count, b, c), zero where `finite` is 0. In pairs where both are
   bfloat16. A column stride other than one is for float32 alone. */
void products(int64_t count, int64_t a, int64_t b, int64_t c, const Matrices *X, const Matrices *Y,
              const uint8_t *finite, float *out, int64_t threads) {
    const int pairs = X->dtype == BFLOAT16 && Y->dtype == BFLOAT16;
    /* Parts of the result, some for each thread; in what order a sum is formed does not depend on them. */
    int64_t height = blocks(a + 1, TALL) * TALL, width = WIDTH;
    while (height > TALL && count * blocks(a, height) * blocks(c, width) < 4 * threads)
        height = blocks(height / TALL, 2) * TALL;
    while (width > PANEL && count * blocks(a, height) * blocks(c, width) < 4 * threads) width /= 2;
    const int64_t bands = blocks(a, height), groups = blocks(c, width);
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t item = 0; item < count * bands * groups; item++) {
        float panels[DEPTH * WIDTH] ALIGNED, tile[TALL * DEPTH] ALIGNED;
        const int64_t n = item / (bands * groups), i0 = item / groups % bands * height, j0 = item % groups * width;
        const int64_t last = min(i0 + height, a), w = min(width, c - j0);
        float *const to = out + n * a * c + j0;
        if (finite && !finite[n]) {
            for (int64_t i = i0; i < last; i++) memset(to + i * c, 0, (size_t)w * 4);
            continue;
        }
        for (int64_t k0 = 0; k0 < b || k0 == 0; k0 += DEPTH) {
            const int64_t K = min(DEPTH, b - k0), terms = pairs ? blocks(K, 2) : K;
            for (int64_t j = 0; j < w; j += PANEL) {
                const int64_t columns = min(PANEL, w - j), line = packed(columns);
                float *const panel = panels + j * DEPTH;
                if (pairs && Y->column != 1) /* a pair is a number of a matrix half as high */
                    load_turned(element(Y, n, k0, j0 + j), 1, Y->column / 2, terms, columns, panel, line);
                else if (!pairs) load(Y, n, k0, K, j0 + j, columns, 1, panel, line);
                else if (columns == PANEL) load_column_pairs(Y, n, k0, K, j0 + j, PANEL, panel, PANEL);
                else load_column_pairs(Y, n, k0, K, j0 + j, columns, panel, line);
            }
            for (int64_t i = i0; i < last; i += TALL) {
                const int64_t rows = min(TALL, last - i);
                const float *from = in_place(X, n, i, k0, K, pairs);
                int64_t row = from ? X->row / (1 + pairs) : DEPTH, step = from && !pairs ? X->column : 1;
                if (!from) {
                    from = tile;
                    if (pairs && X->column != 1) {
                        const Matrices turned = {X->data, X->column, X->row, X->dtype, X->absolute};
                        load_column_pairs(&turned, n, k0, K, i, rows, tile, TALL);
                        row = 1, step = TALL;
                    } else if (pairs) load_pairs(X, n, i, rows, k0, K, tile);
                    else load(X, n, i, rows, k0, K, 1, tile, DEPTH);
                }
                for (int64_t j = 0; j < w; j += PANEL)
                    (pairs ? product_of_pairs : product)(rows, terms, from, row, step, panels + j * DEPTH,
                                                         to + i * c + j, c, min(PANEL, w - j), k0 > 0);
            }
        }
    }
}

/* to -= sum over k < n of a[k * line] b[k * line], of numbers from `first` to `last`. */
INLINE void subtract(const int n, const float *a, const float *b, int64_t line, float *restrict to, int64_t first,
                     int64_t last) {
    for (int64_t j = first; j < last; j++) {
        float sum = to[j];
        UNROLL for (int k = 0; k < n; k++) sum -= a[k * line] * b[k * line + j];
        to[j] = sum;
    }
}

/* Of each matrix U (r, r), symmetric and positive definite: R, lower triangular, with R^T R its inverse. R starts as
   zero, and U is overwritten. Where rounding has left nothing of a direction, its row of R stays zero. */
void inverse_roots(int64_t count, int64_t r, float *U, float *R, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t n = 0; n < count; n++) {
        float *const u = U + n * r * r, *const root = R + n * r * r;
        for (int64_t k0 = 0; k0 < r; k0 += SOME) { /* u becomes the upper triangular factor of Cholesky */
            const int64_t next = min(k0 + SOME, r);
            for (int64_t k = k0; k < next; k++) {
                const float pivot = u[k * r + k], inverse = pivot <= 0 ? 0 : 1 / sqrtf(pivot);
                root[k * r + k] = inverse;
                for (int64_t j = k; j < r; j++) u[k * r + j] *= inverse;
                for (int64_t i = k + 1; i < next; i++) subtract(1, u + k * r + i, u + k * r, r, u + i * r, i, r);
            }
            for (int64_t i = next; i < r; i++) subtract(SOME, u + k0 * r + i, u + k0 * r, r, u + i * r, i, r);
        }
        for (int64_t i = 0; i < r; i++) {
            float *const to = root + i * r;
            const float inverse = to[i];
            int64_t k = 0;
            to[i] = 0;
            for (; k + SOME <= i; k += SOME) subtract(SOME, u + k * r + i, root + k * r, r, to, 0, k + SOME);
            for (; k < i; k++) subtract(1, u + k * r + i, root + k * r, r, to, 0, k + 1);
            for (int64_t j = 0; j < i; j++) to[j] *= inverse;
            to[i] = inverse;
        }
    }
}

/* `Moments` of gradient.py, and what else an update is made of. A number is a vector with one for each matrix. */
typedef struct {
    int64_t count, rows, columns, height, threads; /* a thread takes `height` rows at a time */
    Matrices weights, grads, B[2], A[2];           /* column strides are one */
    int64_t rank[2];                               /* zero: no such product */
    int64_t in_m[2], in_v[2];                      /* whether it counts in m, and its square in v */
    const float *a[2], *b, *c[2], *d;
    const float *row, *column;                     /* (count, rows) and (count, columns), or NULL */
    Matrices ema[2];                               /* all of m, all of v in the place of a product, or NULL */
    const float *rate[2], *unbias[2];
    const float *lr, *decay;
    float scale, eps;                              /* g is `scale` times the gradient */
    const uint8_t *finite;                         /* or NULL */
    const int64_t *keys;                           /* or NULL: bfloat16 weights are rounded to nearest */
    const uint32_t *row_index, *column_index;      /* for the keys: an element has the sum of both */
    float *row_sums, *column_sums; /* of g^2, zero so far: (count, rows), (count, parts of `height` rows, columns) */
} Step;

/* Lines of numbers `line` apart: of PANEL numbers next to each other, or of the same zeros. */
typedef struct {
    const float *data;
    int64_t line;
} Lines;

/* What m and v of h x w elements are made of, from row i and column j of matrix n on. */
typedef struct {
    int64_t n, i, h, j, w;
    Lines in_m[2], in_v[2], g_in_m, g_in_v, rest;
    const float *row; /* factors of `rest`, or NULL */
} Part;

INLINE const float *line_of(Lines x, int64_t k) { return x.data + k * x.line; }

/* Sums of g^2 over rows (h, LANES), in LANES parts, and columns (PANEL) are added to those there. */
static void add_squares(const float *g, int64_t h, float *of_rows, float *of_columns) {
    vec sum[VECTORS] = {0};
    for (int64_t i = 0; i < h; i++, g += PANEL, of_rows += LANES) {
        vec total = *(const loose *)of_rows;
        UNROLL for (int k = 0; k < VECTORS; k++) {
            const vec x = *(const loose *)(g + k * LANES);
            total += x * x;
            sum[k] += x * x;
        }
        *(loose *)of_rows = total;
    }
    UNROLL for (int k = 0; k < VECTORS; k++) *(loose *)(of_columns + k * LANES) += sum[k];
}

/* Moves a moment kept in full towards g or, the second, towards g^2; `to` becomes its unbiased value. */
static void move(const Step *s, const int second, const Part *part, const float *g, float *to) {
    const float rate = s->rate[second][part->n], unbias = s->unbias[second][part->n];
    for (int64_t k = 0; k < part->h; k++, g += PANEL, to += PANEL) {
        float *const ema = (float *)element(&s->ema[second], part->n, part->i + k, part->j);
        prefetch(ema + PANEL);
        for (int64_t l = 0; l < part->w; l++) {
            /* No difference: a square may be infinite, and the moment is no number then for ever. */
            ema[l] = (1 - rate) * ema[l] + rate * (second ? g[l] * g[l] : g[l]);
            to[l] = unbias * ema[l];
        }
    }
}

INLINE void update_lines(const Step *s, const Part *part, const int dtype, const int noisy, const int64_t w) {
    const int64_t n = part->n;
    const float a0 = s->a[0][n], a1 = s->a[1][n], b = s->b[n], c0 = s->c[0][n], c1 = s->c[1][n], d = s->d[n];
    const float decay = s->decay[n], lr = s->lr[n], eps = s->eps;
    const uint32_t key = noisy ? (uint32_t)s->keys[n] : 0;
    for (int64_t k = 0; k < part->h; k++) {
        const float *const m0 = line_of(part->in_m[0], k), *const m1 = line_of(part->in_m[1], k);
        const float *const v0 = line_of(part->in_v[0], k), *const v1 = line_of(part->in_v[1], k);
        const float *const gm = line_of(part->g_in_m, k), *const gv = line_of(part->g_in_v, k);
        const float *const rest = line_of(part->rest, k), factor = part->row ? part->row[k] : 1;
        void *const x = (void *)element(&s->weights, n, part->i + k, part->j);
        prefetch(element(&s->weights, n, part->i + k, part->j + PANEL));
        prefetch(element(&s->grads, n, part->i + k, part->j + PANEL));
        const uint32_t index = noisy ? s->row_index[part->i + k] : 0;
        for (int64_t l = 0; l < w; l++) {
            const float m = a0 * m0[l] + a1 * m1[l] + b * gm[l];
            /* Weighed before they are squared: a square may be infinite, and a weight zero. */
            const float v = (c0 * v0[l]) * v0[l] + (c1 * v1[l]) * v1[l] + d * (gv[l] * gv[l]) + factor * rest[l];
            const float new = decay * number(dtype, x, l) - lr * m / (sqrtf(v) + eps);
            if (dtype == FLOAT32) ((float *)x)[l] = new;
            else if (dtype == FLOAT16) ((uint16_t *)x)[l] = nearest_half(new);
            else if (noisy) ((uint16_t *)x)[l] = noisy_bfloat16(new, index + s->column_index[part->j + l], key);
            else ((uint16_t *)x)[l] = nearest_bfloat16(new);
        }
    }
}

INLINE void update_any(const Step *s, const Part *part, const int dtype, const int noisy) {
    if (part->w == PANEL) update_lines(s, part, dtype, noisy, PANEL); /* much faster for a constant */
    else update_lines(s, part, dtype, noisy, part->w);
}

static void update(const Step *s, const Part *part) {
    if (s->weights.dtype == FLOAT32) update_any(s, part, FLOAT32, 0);
    else if (s->weights.dtype == FLOAT16) update_any(s, part, FLOAT16, 0);
    else if (s->keys) update_any(s, part, BFLOAT16, 1);
    else update_any(s, part, BFLOAT16, 0);
}

/* The weights <- decay weights - lr m / (sqrt(v) + eps), and sums of g^2; nothing where `finite` is 0. */
void step(const Step *s) {
    static const float zeros[PANEL] ALIGNED;
    const int64_t parts = blocks(s->rows, s->height);
#pragma omp parallel for schedule(static) num_threads((int)s->threads)
    for (int64_t item = 0; item < s->count * parts; item++) {
        float P[2][HEIGHT * PANEL] ALIGNED, panel[DEPTH * PANEL] ALIGNED, G[BAND * PANEL] ALIGNED;
        float of_rows[HEIGHT * LANES] ALIGNED; /* a vector of partial sums for each row */
        const int64_t n = item / parts, first = item % parts * s->height, last = min(first + s->height, s->rows);
        if (s->finite && !s->finite[n]) continue;
        for (int64_t i0 = first; i0 < last; i0 += HEIGHT) {
            const int64_t h = min(HEIGHT, last - i0);
            memset(of_rows, 0, sizeof of_rows);
            for (int64_t j0 = 0; j0 < s->columns; j0 += PANEL) {
                const int64_t w = min(PANEL, s->columns - j0);
                float of_columns[PANEL] ALIGNED = {0};
                for (int x = 0; x < 2; x++)
                    for (int64_t k0 = 0; k0 < s->rank[x]; k0 += DEPTH) {
                        const int64_t K = min(DEPTH, s->rank[x] - k0);
                        load(&s->A[x], n, k0, K, j0, w, 1, panel, packed(w));
                        product(h, K, element(&s->B[x], n, i0, k0), s->B[x].row, 1, panel, P[x], PANEL, w, k0 > 0);
                    }
                for (int64_t i = 0; i < h; i += BAND) {
                    Part part = {.n = n, .i = i0 + i, .h = min(BAND, h - i), .j = j0, .w = w};
                    const Lines nothing = {zeros, 0}, g = {G, PANEL};
                    load(&s->grads, n, part.i, part.h, j0, w, s->scale, G, PANEL);
                    add_squares(G, part.h, of_rows + i * LANES, of_columns);
                    for (int x = 0; x < 2; x++) {
                        const Lines own = {P[x] + i * PANEL, PANEL};
                        if (s->ema[x].data) move(s, x, &part, G, P[x] + i * PANEL);
                        part.in_m[x] = s->in_m[x] ? own : nothing;
                        part.in_v[x] = s->in_v[x] ? own : nothing;
                    }
                    part.g_in_m = s->ema[0].data ? nothing : g;
                    part.g_in_v = s->ema[1].data ? nothing : g;
                    part.rest = nothing;
                    if (s->ema[1].data) part.rest = (Lines){P[1] + i * PANEL, PANEL};
                    else if (s->row) {
                        part.rest = (Lines){s->column + n * s->columns + j0, 0};
                        part.row = s->row + n * s->rows + part.i;
                    }
                    update(s, &part);
                }
                float *const sums = s->column_sums + item * s->columns + j0;
                for (int64_t k = 0; k < w; k++) sums[k] += of_columns[k];
            }
            for (int64_t i = 0; i < h; i++)
                for (int k = 0; k < LANES; k++) s->row_sums[n * s->rows + i0 + i] += of_rows[i * LANES + k];
        }
    }
}
