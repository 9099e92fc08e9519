/* On CPUs: products with gradients, and the update of the weights in one pass over memory.

   library.py compiles this file, c.py calls it and checks everything that it hands over. All
   arithmetic is float32, whatever the dtype of the operands. In what order a sum is formed depends
   on the shape and on the width of the processor's vectors, never on the number of threads.

   Products are made as in BLIS (Van Zee, van de Geijn 2015): a block of ROWS x VECTORS vectors of
   the result stays in registers while one factor is read a number at a time and the other, packed
   into a panel, a row at a time. The gradients and weights of a large model are in no cache: their
   tiles have few rows and follow these, and each is fetched while the one before is at work. */

#include <math.h>
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
    PANEL = VECTORS * LANES, /* columns of a block */
    DEPTH = 128,             /* terms of a sum that join the rest together: a panel fits in L1 */
    HEIGHT = 128,            /* rows that are updated, or multiplied, by factors packed once */
    WIDTH = 12 * PANEL,      /* columns that a thread takes, of which factors are packed */
    SPAN = 4 * PANEL,        /* the same of L T where matrices are fewer than threads */
};

typedef float vec __attribute__((vector_size(4 * LANES)));               /* in a register */
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4))); /* in memory */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ALIGNED __attribute__((aligned(64)))
#if defined(__x86_64__) /* or GCC reads x from memory once for each of its uses */
#define IN_REGISTER(x) __asm__("" : "+v"(x))
#else
#define IN_REGISTER(x)
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* Same-shaped matrices with contiguous rows. */
typedef struct {
    void *const *data; /* an address for each */
    int64_t row;       /* elements from a row to the next */
    int64_t dtype;
} Matrices;

/* The numbers of one matrix. */
typedef struct {
    float lr, decay, b, d;
    struct { float a, c; } term[2]; /* of the products */
} Numbers;

/* `Moments` of gradient.py, and what else an update or a product with gradients is made of. */
typedef struct {
    int64_t count, rows, columns, height, threads; /* a thread takes `height` rows at a time */
    Matrices weights, grads;
    const float *B[2], *A[2];      /* (count, rows, rank) and (count, rank, columns) */
    int64_t rank[2];               /* zero: no such product */
    const float *factor;           /* of a product: X (count, columns, rank[0]) of T X, or */
    float *out;                    /* L (count, rank[0], rows) of L T; the product, zero so far */
    int64_t absolute;              /* T is the absolute value of the gradient */
    const Numbers *numbers;        /* (count,) */
    const float *row, *column;     /* (count, rows) and (count, columns), or NULL */
    const uint8_t *finite;         /* (count,), or NULL */
    const int64_t *keys;           /* (count,), or NULL: bfloat16 is rounded to nearest */
    const uint32_t *row_index, *column_index; /* for the keys: an element has the sum */
    float *row_sums;               /* of g^2, (count, rows), zero so far; or NULL */
    float *column_sums;            /* the same of (count, parts of `height` rows, columns) */
    float scale, eps;              /* g is `scale` times the gradient */
} Step;

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void *element(const Matrices *x, int64_t n, int64_t i, int64_t j) {
    return (char *)x->data[n] + (i * x->row + j) * (x->dtype == FLOAT32 ? 4 : 2);
}

/* h x PANEL numbers from row i and column j on, which are read soon. More than some twenty lines of
   the cache at once would wait for one another. */
INLINE void prefetch(const Matrices *x, int64_t n, int64_t i, int64_t h, int64_t j) {
    for (; h > 0; i++, h--)
        UNROLL for (int k = 0; k < VECTORS; k++)
            __builtin_prefetch((const char *)element(x, n, i, j) + 64 * k);
}

INLINE int is_finite(const Step *s, int64_t n) { return !s->finite || s->finite[n]; }

INLINE float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* float16 is converted in integers: before GCC 12, x86 has no _Float16. */
INLINE float half_to_float(uint16_t half) {
    const uint32_t bits = (uint32_t)(half & 0x7FFF) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t finite = float_to_bits(bits_to_float(bits) * 0x1p112f);
    return bits_to_float(sign | ((half & 0x7C00) == 0x7C00 ? bits | 0x7F800000 : finite));
}

INLINE uint16_t nearest_half(float x) {
    const uint32_t sign = float_to_bits(x) >> 16 & 0x8000, bits = float_to_bits(x) & 0x7FFFFFFF;
    /* 0.5 has the ulp of subnormals. */
    const uint32_t small = float_to_bits(bits_to_float(bits) + 0.5f) - 0x3F000000;
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
    if ((bits & 0x7F800000) == 0x7F800000) return nearest_bfloat16(x);
    return (uint16_t)(rounded - ((rounded & 0x7F80) == 0x7F80)); /* at most the largest number */
}

INLINE float number(const int dtype, const void *data, int64_t index) {
    if (dtype == FLOAT32) return ((const float *)data)[index];
    if (dtype == BFLOAT16) return bits_to_float((uint32_t)((const uint16_t *)data)[index] << 16);
    return half_to_float(((const uint16_t *)data)[index]);
}

/* (h, w) numbers in rows `row` apart or their absolute values, times `scale`, as rows of PANEL that
   zeros fill up. */
INLINE void load_rows(const int dtype, const int64_t w, const void *from, int64_t row, int64_t h,
                      float scale, int absolute, float *restrict to) {
    for (int64_t i = 0; i < h; i++, to += PANEL) {
        for (int64_t j = 0; j < w; j++) {
            const float x = number(dtype, from, i * row + j);
            to[j] = scale * (absolute ? fabsf(x) : x);
        }
        for (int64_t j = w; j < PANEL; j++) to[j] = 0;
    }
}

/* The same, much faster for constant widths. */
static void load(int64_t dtype, int64_t w, const void *from, int64_t row, int64_t h, float scale,
                 int absolute, float *to) {
#define LOAD(type, width) load_rows(type, width, from, row, h, scale, absolute, to)
    if (dtype == FLOAT32 && w == PANEL) LOAD(FLOAT32, PANEL);
    else if (dtype == FLOAT32 && w == LANES) LOAD(FLOAT32, LANES);
    else if (dtype == FLOAT32) LOAD(FLOAT32, w);
    else if (dtype == BFLOAT16 && w == PANEL) LOAD(BFLOAT16, PANEL);
    else if (dtype == BFLOAT16) LOAD(BFLOAT16, w);
    else LOAD(FLOAT16, w);
#undef LOAD
}

static void load_gradient(const Step *s, int64_t n, int64_t i, int64_t h, int64_t j, int64_t w,
                          float *to) {
    const void *const from = element(&s->grads, n, i, j);
    load(s->grads.dtype, w, from, s->grads.row, h, s->scale, s->absolute != 0, to);
}

/* P (rows, w), in rows `line` apart, (+)= B (rows, K), in rows `row` apart, times the first w
   columns of a panel (K, PANEL), which are in its first `vectors`. Sums join P at the end, so that
   errors of long ones in parts do not grow with their length. */
INLINE void block(const int rows, const int vectors, int64_t K, const float *B, int64_t row,
                  const float *panel, float *P, int64_t line, int64_t w, int add) {
    vec sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = (vec){0};
    for (int64_t k = 0; k < K; k++, panel += PANEL) {
        vec y[VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) {
            y[j] = *(const vec *)(panel + j * LANES);
            IN_REGISTER(y[j]);
        }
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int j = 0; j < vectors; j++) sum[i][j] += B[i * row + k] * y[j];
    }
    UNROLL for (int i = 0; i < rows; i++, P += line) {
        float part[PANEL] ALIGNED;
        for (int64_t l = 0; add && w < vectors * LANES && l < w; l++) part[l] = P[l];
        UNROLL for (int j = 0; j < vectors; j++) {
            loose *const to = (loose *)((w < vectors * LANES ? part : P) + j * LANES);
            *to = add ? sum[i][j] + *to : sum[i][j];
        }
        for (int64_t l = 0; w < vectors * LANES && l < w; l++) P[l] = part[l];
    }
}

/* The same of h rows. */
INLINE void blocks_of(const int vectors, int64_t h, int64_t K, const float *B, int64_t row,
                      const float *panel, float *P, int64_t line, int64_t w, int add) {
    for (; h >= ROWS; h -= ROWS, B += ROWS * row, P += ROWS * line)
        block(ROWS, vectors, K, B, row, panel, P, line, w, add);
    for (; h > 0; h--, B += row, P += line) block(1, vectors, K, B, row, panel, P, line, w, add);
}

static void blocks(int64_t h, int64_t K, const float *B, int64_t row, const float *panel, float *P,
                   int64_t line, int64_t w, int add) {
    if (w <= LANES) blocks_of(1, h, K, B, row, panel, P, line, w, add);
    else if (w <= 2 * LANES) blocks_of(2, h, K, B, row, panel, P, line, w, add);
    else blocks_of(VECTORS, h, K, B, row, panel, P, line, w, add);
}

/* P (h, PANEL) = B A of matrix n, of rows from i and w columns from j on. These columns of A, of at
   most DEPTH rows, are in `panel` already; or else are packed there, in parts. */
static void product(const Step *s, int which, int64_t n, int64_t i, int64_t h, int64_t j,
                    int64_t w, int packed, float *panel, float *P) {
    const int64_t rank = s->rank[which];
    for (int64_t k = 0; k < rank; k += DEPTH) {
        const int64_t K = min(DEPTH, rank - k);
        const float *const A = s->A[which] + (n * rank + k) * s->columns + j;
        const float *const B = s->B[which] + (n * s->rows + i) * rank + k;
        if (!packed) load(FLOAT32, w, A, s->columns, K, 1, 0, panel);
        blocks(h, K, B, rank, panel, P, PANEL, PANEL, k > 0);
    }
}

/* Lines of numbers `line` apart: of PANEL numbers next to each other, or of the same zeros. */
typedef struct { const float *data; int64_t line; } Lines;

/* What m and v of h x w elements are made of, from row i and column j of matrix n on. */
typedef struct {
    int64_t n, i, h, j, w;
    Lines in_m[2], in_v[2], g_in_m, g_in_v, rest;
    const float *row; /* factors of `rest`, or NULL */
} Part;

INLINE const float *line_of(Lines x, int64_t k) { return x.data + k * x.line; }

/* Lines of a tile; of zeros where its weight is zero, as it may hold infinity. */
INLINE Lines weighed(const float *tile, float weight) {
    static const float zeros[PANEL] ALIGNED;
    return weight != 0 ? (Lines){tile, PANEL} : (Lines){zeros, 0};
}

/* Sums of g^2 over rows (h, LANES), in LANES parts, and columns (PANEL) join those there. */
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

INLINE void update_lines(const Step *s, const Part *part, const int dtype, const int noisy,
                         const int64_t w) {
    const int64_t n = part->n;
    const Numbers *const x = s->numbers + n;
    const float a0 = x->term[0].a, a1 = x->term[1].a, b = x->b, eps = s->eps;
    const float c0 = x->term[0].c, c1 = x->term[1].c, d = x->d, decay = x->decay, lr = x->lr;
    const uint32_t key = noisy ? (uint32_t)s->keys[n] : 0;
    for (int64_t k = 0; k < part->h; k++) {
        const float *const m0 = line_of(part->in_m[0], k), *const m1 = line_of(part->in_m[1], k);
        const float *const v0 = line_of(part->in_v[0], k), *const v1 = line_of(part->in_v[1], k);
        const float *const gm = line_of(part->g_in_m, k), *const gv = line_of(part->g_in_v, k);
        const float *const rest = line_of(part->rest, k), factor = part->row ? part->row[k] : 1;
        float *const weight = element(&s->weights, n, part->i + k, part->j);
        uint16_t *const half = (uint16_t *)weight;
        prefetch(&s->weights, n, part->i + k, 1, part->j + PANEL);
        prefetch(&s->grads, n, part->i + k, 1, part->j + PANEL);
        const uint32_t index = noisy ? s->row_index[part->i + k] : 0;
        const uint32_t *const places = noisy ? s->column_index + part->j : NULL;
#pragma GCC ivdep /* or every row checks whether weights overlap with what they are made of */
        for (int64_t l = 0; l < w; l++) {
            const float m = a0 * m0[l] + a1 * m1[l] + b * gm[l];
            /* Weighed before they are squared: a square may be infinite, and a weight zero. */
            const float squares = (c0 * v0[l]) * v0[l] + (c1 * v1[l]) * v1[l];
            const float v = squares + d * (gv[l] * gv[l]) + factor * rest[l];
            const float new = decay * number(dtype, weight, l) - lr * m / (sqrtf(v) + eps);
            if (dtype == FLOAT32) weight[l] = new;
            else if (dtype == FLOAT16) half[l] = nearest_half(new);
            else if (noisy) half[l] = noisy_bfloat16(new, index + places[l], key);
            else half[l] = nearest_bfloat16(new);
        }
    }
}

INLINE void update_any(const Step *s, const Part *part, const int dtype, const int noisy) {
    if (part->w == PANEL) update_lines(s, part, dtype, noisy, PANEL); /* as in `load` */
    else update_lines(s, part, dtype, noisy, part->w);
}

static void update(const Step *s, const Part *part) {
    if (s->weights.dtype == FLOAT32) update_any(s, part, FLOAT32, 0);
    else if (s->weights.dtype == FLOAT16) update_any(s, part, FLOAT16, 0);
    else if (s->keys) update_any(s, part, BFLOAT16, 1);
    else update_any(s, part, BFLOAT16, 0);
}

/* h x w elements, from row i and column j of matrix n on; sums of g^2 join those there. */
static void step_tile(const Step *s, int64_t n, int64_t i, int64_t h, int64_t j, int64_t w,
                      const float *P0, const float *P1, float *of_rows, float *column_sums) {
    float G[ROWS * PANEL] ALIGNED, of_columns[PANEL] ALIGNED = {0};
    const Numbers *const x = s->numbers + n;
    load_gradient(s, n, i, h, j, w, G);
    if (s->row_sums) {
        add_squares(G, h, of_rows, of_columns);
        for (int64_t k = 0; k < w; k++) column_sums[j + k] += of_columns[k];
    }
    Part part = {.n = n, .i = i, .h = h, .j = j, .w = w, .rest = weighed(G, 0)};
    part.in_m[0] = weighed(P0, x->term[0].a), part.in_v[0] = weighed(P0, x->term[0].c);
    part.in_m[1] = weighed(P1, x->term[1].a), part.in_v[1] = weighed(P1, x->term[1].c);
    part.g_in_m = weighed(G, x->b), part.g_in_v = weighed(G, x->d);
    if (s->row) {
        part.rest = (Lines){s->column + n * s->columns + j, 0};
        part.row = s->row + n * s->rows + i;
    }
    update(s, &part);
}

/* HEIGHT rows or less, h from row i0 on, of matrix n; sums over columns join those there. Where the
   rank is small, A is packed for as many columns as fit, and tiles lie beside each other. */
static void step_rows(const Step *s, int64_t n, int64_t i0, int64_t h, float *column_sums) {
    float panels[4 * DEPTH * PANEL] ALIGNED, P[2][HEIGHT * PANEL] ALIGNED;
    float of_rows[HEIGHT * LANES] ALIGNED = {0}; /* a vector of partial sums for each row */
    const int64_t ranks = s->rank[0] + s->rank[1], small = ranks <= DEPTH;
    const int64_t width = small ? 4 * DEPTH / (ranks + !ranks) * PANEL : PANEL;
    const int64_t height = small ? ROWS : HEIGHT, second = min(s->rank[0], DEPTH) * PANEL;
    for (int64_t j0 = 0; j0 < s->columns; j0 += width)
        for (int64_t i = 0; i < h; i += height)
            for (int64_t j = j0; j < min(j0 + width, s->columns); j += PANEL) {
                const int64_t w = min(PANEL, s->columns - j), end = min(i + height, h);
                float *const panel = panels + (j - j0) * ranks;
                for (int k = 0; k < 2; k++)
                    product(s, k, n, i0 + i, end - i, j, w, i > 0, panel + k * second, P[k]);
                for (int64_t l = i; l < end; l += ROWS)
                    step_tile(s, n, i0 + l, min(ROWS, end - l), j, w, P[0] + (l - i) * PANEL,
                              P[1] + (l - i) * PANEL, of_rows + l * LANES, column_sums);
            }
    for (int64_t i = 0; s->row_sums && i < h; i++)
        for (int k = 0; k < LANES; k++)
            s->row_sums[n * s->rows + i0 + i] += of_rows[i * LANES + k];
}

/* The weights <- decay weights - lr m / (sqrt(v) + eps), sums of g^2; not where `finite` is 0. */
void step(const Step *s) {
    const int64_t parts = (s->rows + s->height - 1) / s->height;
#pragma omp parallel for schedule(static) num_threads((int)s->threads)
    for (int64_t item = 0; item < s->count * parts; item++) {
        const int64_t n = item / parts, first = item % parts * s->height;
        const int64_t last = min(first + s->height, s->rows);
        if (!is_finite(s, n)) continue;
        for (int64_t i = first; i < last; i += HEIGHT)
            step_rows(s, n, i, min(HEIGHT, last - i), s->column_sums + item * s->columns);
    }
}

/* T X (count, rows, rank[0]): sums over PANEL columns at a time join `out`. */
void right(const Step *s) {
    const int64_t bands = (s->rows + HEIGHT - 1) / HEIGHT, rank = s->rank[0];
#pragma omp parallel for schedule(static) num_threads((int)s->threads)
    for (int64_t item = 0; item < s->count * bands; item++) {
        const int64_t n = item / bands, i0 = item % bands * HEIGHT, end = min(i0 + HEIGHT, s->rows);
        float tile[ROWS * PANEL] ALIGNED, panels[WIDTH * PANEL] ALIGNED;
        for (int64_t j0 = 0; j0 < s->columns && is_finite(s, n); j0 += WIDTH)
            for (int64_t k = 0; k < rank; k += PANEL) {
                const int64_t w = min(PANEL, rank - k), last = min(j0 + WIDTH, s->columns);
                const float *const X = s->factor + (n * s->columns + j0) * rank + k;
                load(FLOAT32, w, X, rank, last - j0, 1, 0, panels);
                for (int64_t i = i0; i < end; i += ROWS)
                    for (int64_t j = j0; j < last; j += PANEL) {
                        const int64_t h = min(ROWS, end - i), K = min(PANEL, last - j);
                        prefetch(&s->grads, n, i, h, j + PANEL);
                        load_gradient(s, n, i, h, j, K, tile);
                        blocks(h, K, tile, PANEL, panels + (j - j0) * PANEL,
                               s->out + (n * s->rows + i) * rank + k, rank, w, 1);
                    }
            }
    }
}

/* L T (count, rank[0], columns): sums over `depth` rows at a time join `out`. */
void left(const Step *s) {
    const int64_t span = s->count < s->threads ? SPAN : WIDTH, rank = s->rank[0];
    const int64_t spans = (s->columns + span - 1) / span;
    /* The blocks of the product with a tile fetch the next one, ROWS rows each. */
    const int64_t depth = rank < 2 * ROWS ? 2 * ROWS : min(rank, DEPTH);
#pragma omp parallel for schedule(static) num_threads((int)s->threads)
    for (int64_t item = 0; item < s->count * spans; item++) {
        const int64_t n = item / spans, j0 = item % spans * span;
        const int64_t last = min(j0 + span, s->columns);
        float panel[DEPTH * PANEL] ALIGNED;
        for (int64_t i = 0; i < s->rows && is_finite(s, n); i += depth)
            for (int64_t j = j0; j < last; j += PANEL) {
                const int64_t K = min(depth, s->rows - i), w = min(PANEL, last - j);
                const int64_t below = j + PANEL < last ? 0 : K, next = below ? j0 : j + PANEL;
                const float *const L = s->factor + n * rank * s->rows + i;
                float *const out = s->out + n * rank * s->columns + j;
                load_gradient(s, n, i, K, j, w, panel);
                for (int64_t k = 0; k < rank; k += ROWS) {
                    if (k < K) prefetch(&s->grads, n, i + below + k, ROWS, next);
                    blocks(min(ROWS, rank - k), K, L + k * s->rows, s->rows, panel,
                           out + k * s->columns, s->columns, w, 1);
                }
            }
    }
}

/* The weights, which are bfloat16, <- the float32 numbers in `out` (count, rows, columns). */
void store(const Step *s) {
    const int64_t columns = s->columns;
#pragma omp parallel for schedule(static) num_threads((int)s->threads)
    for (int64_t item = 0; item < s->count * s->rows; item++) {
        const int64_t n = item / s->rows, i = item % s->rows;
        const uint32_t key = (uint32_t)s->keys[n], index = s->row_index[i];
        const uint32_t *const places = s->column_index;
        const float *const from = s->out + item * columns;
        uint16_t *const to = element(&s->weights, n, i, 0);
#pragma GCC ivdep
        for (int64_t j = 0; j < columns; j++)
            to[j] = noisy_bfloat16(from[j], index + places[j], key);
    }
}
