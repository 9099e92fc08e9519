/* The three primitives of a step on CPUs: products with the gradient, other products, and the
   update of the weights.

   library.py compiles this file, c.py calls it and checks everything that it hands over. All
   arithmetic is float32, whatever the dtype of the operands. In what order a sum is formed depends
   on the shape and on the width of the processor's vectors, never on the number of threads.

   Products are made as in BLIS (Van Zee, van de Geijn 2015): a block of ROWS x VECTORS vectors of
   the result stays in registers while one operand is read a number at a time and the other, packed
   into panels, a row at a time. */

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
    TALL = 64,               /* rows of the left operand that meet a panel at a time */
    WIDTH = 8 * PANEL,       /* columns packed at a time, at most: they fit in L2 */
    HEIGHT = 128,            /* rows of B A that `step` holds */
    BAND = 32,               /* rows of a gradient that `step` holds */
    SOME = 8,                /* rows that `inverse_roots` takes at a time */
};

typedef float vec __attribute__((vector_size(4 * LANES)));               /* in a register */
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4))); /* in memory */
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

INLINE const void *element(const Matrices *x, int64_t n, int64_t i, int64_t j) {
    return (const char *)x->data[n] + (i * x->row + j * x->column) * (x->dtype == FLOAT32 ? 4 : 2);
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

/* (h, w) numbers, in rows `row` apart, times `scale`; `keep` are bits. */
INLINE void load_lines(const int dtype, const int64_t w, const void *from, int64_t row, int64_t h,
                       float scale, uint32_t keep, float *restrict to, int64_t line) {
    for (int64_t i = 0; i < h; i++)
        for (int64_t j = 0; j < w; j++) {
            const float x = scale * number(dtype, from, i * row + j);
            to[i * line + j] = bits_to_float(float_to_bits(x) & keep);
        }
}

/* The same, much faster for a constant width. */
INLINE void load_any(const int dtype, int64_t w, const void *from, int64_t row, int64_t h,
                     float scale, uint32_t keep, float *to, int64_t line) {
    if (w == PANEL) load_lines(dtype, PANEL, from, row, h, scale, keep, to, line);
    else load_lines(dtype, w, from, row, h, scale, keep, to, line);
}

/* (h, w) float32 numbers `row` and `column` apart, by small squares, which caches hold. */
static void load_turned(const float *from, int64_t row, int64_t column, int64_t h, int64_t w,
                        float *to, int64_t line) {
    for (int64_t i = 0; i < h; i += LANES)
        for (int64_t j = 0; j < w; j += LANES)
            for (int64_t k = i; k < min(i + LANES, h); k++)
                for (int64_t l = j; l < min(j + LANES, w); l++)
                    to[k * line + l] = from[k * row + l * column];
}

/* (h, w) numbers of matrix n from row i and column j on, times `scale`, in lines that zeros fill
   up. Numbers of a row lie next to each other, but for float32. */
static void load(const Matrices *x, int64_t n, int64_t i, int64_t h, int64_t j, int64_t w,
                 float scale, float *to, int64_t line) {
    const void *const from = element(x, n, i, j);
    const uint32_t keep = x->absolute ? 0x7FFFFFFF : 0xFFFFFFFF;
    if (x->column != 1 && x->dtype == FLOAT32)
        load_turned(from, x->row, x->column, h, w, to, line);
    else if (x->dtype == FLOAT32) load_any(FLOAT32, w, from, x->row, h, scale, keep, to, line);
    else if (x->dtype == BFLOAT16) load_any(BFLOAT16, w, from, x->row, h, scale, keep, to, line);
    else load_any(FLOAT16, w, from, x->row, h, scale, keep, to, line);
    for (int64_t k = 0; w < line && k < h; k++)
        memset(to + k * line + w, 0, (size_t)(line - w) * 4);
}

/* c[i][j] (+)= sum over k < K of a[i * row + k * step] b[k][j] for `rows` x `vectors` LANES, of
   which the first w columns are stored. Sums join what is there at the end, so that errors of long
   ones in parts do not grow with their length. */
INLINE void block(const int rows, const int vectors, int64_t K, const float *a, int64_t row,
                  int64_t step, const float *b, float *c, int64_t line, int64_t w, int add) {
    vec sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = (vec){0};
    for (int64_t k = 0; k < K; k++, a += step, b += vectors * LANES) {
        vec y[VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) y[j] = *(const loose *)(b + j * LANES);
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int j = 0; j < vectors; j++) sum[i][j] += a[i * row] * y[j];
    }
    float last[ROWS * PANEL] ALIGNED; /* on its way to a place that is narrower than vectors */
    const int whole = w == vectors * LANES;
    for (int64_t i = 0; !whole && add && i < rows; i++)
        memcpy(last + i * PANEL, c + i * line, (size_t)w * 4);
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) {
            loose *const to = (loose *)((whole ? c + i * line : last + i * PANEL) + j * LANES);
            *to = add ? sum[i][j] + *to : sum[i][j];
        }
    for (int64_t i = 0; !whole && i < rows; i++)
        memcpy(c + i * line, last + i * PANEL, (size_t)w * 4);
}

INLINE void blocks_of(const int vectors, int64_t rows, int64_t K, const float *a, int64_t row,
                      int64_t step, const float *b, float *c, int64_t line, int64_t w, int add) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * row, c += ROWS * line)
        block(ROWS, vectors, K, a, row, step, b, c, line, w, add);
    for (; rows > 0; rows--, a += row, c += line)
        block(1, vectors, K, a, row, step, b, c, line, w, add);
}

/* c (rows, w) (+)= a (rows, K) b (K, w), b packed: in lines of `packed(w)`. */
static void product(int64_t rows, int64_t K, const float *a, int64_t row, int64_t step,
                    const float *b, float *c, int64_t line, int64_t w, int add) {
    if (w <= LANES) blocks_of(1, rows, K, a, row, step, b, c, line, w, add);
    else if (w <= 2 * LANES) blocks_of(2, rows, K, a, row, step, b, c, line, w, add);
    else blocks_of(3, rows, K, a, row, step, b, c, line, w, add);
}

INLINE int64_t packed(int64_t w) { return blocks(w, LANES) * LANES; }

/* out (count, a, c) = X Y of X (count, a, b) and Y (count, b, c), zero where `finite` is 0. */
void products(int64_t count, int64_t a, int64_t b, int64_t c, const Matrices *X, const Matrices *Y,
              const uint8_t *finite, float *out, int64_t threads) {
    /* Parts of the result, some for each thread; no order of a sum depends on them. */
    int64_t height = blocks(a + 1, TALL) * TALL, width = WIDTH;
    while (height > TALL && count * blocks(a, height) * blocks(c, width) < 4 * threads)
        height = blocks(height / TALL, 2) * TALL;
    while (width > PANEL && count * blocks(a, height) * blocks(c, width) < 4 * threads) width /= 2;
    const int64_t bands = blocks(a, height), groups = blocks(c, width);
    const int in_place = X->dtype == FLOAT32 && !X->absolute;
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t item = 0; item < count * bands * groups; item++) {
        float panels[DEPTH * WIDTH] ALIGNED, tile[TALL * DEPTH] ALIGNED;
        const int64_t n = item / (bands * groups), j0 = item % groups * width;
        const int64_t i0 = item / groups % bands * height;
        const int64_t last = min(i0 + height, a), w = min(width, c - j0);
        float *const to = out + n * a * c + j0;
        if (b == 0 || (finite && !finite[n]))
            for (int64_t i = i0; i < last; i++) memset(to + i * c, 0, (size_t)w * 4);
        for (int64_t k0 = 0; k0 < b && (!finite || finite[n]); k0 += DEPTH) {
            const int64_t K = min(DEPTH, b - k0);
            for (int64_t j = 0; j < w; j += PANEL) {
                const int64_t columns = min(PANEL, w - j);
                load(Y, n, k0, K, j0 + j, columns, 1, panels + j * DEPTH, packed(columns));
            }
            for (int64_t i = i0; i < last; i += TALL) {
                const int64_t rows = min(TALL, last - i);
                const float *const from = in_place ? element(X, n, i, k0) : tile;
                if (!in_place) load(X, n, i, rows, k0, K, 1, tile, DEPTH);
                for (int64_t j = 0; j < w; j += PANEL)
                    product(rows, K, from, in_place ? X->row : DEPTH, in_place ? X->column : 1,
                            panels + j * DEPTH, to + i * c + j, c, min(PANEL, w - j), k0 > 0);
            }
        }
    }
}

/* to -= sum over k < n of a[k * line] b[k * line], of numbers from `first` to `last`. */
INLINE void subtract(const int n, const float *a, const float *b, int64_t line, float *restrict to,
                     int64_t first, int64_t last) {
    for (int64_t j = first; j < last; j++) {
        float sum = to[j];
        UNROLL for (int k = 0; k < n; k++) sum -= a[k * line] * b[k * line + j];
        to[j] = sum;
    }
}

/* Of each U (r, r), symmetric and positive definite: R, lower triangular, with R^T R its inverse.
   R starts as zero, and U becomes the upper triangular factor of Cholesky. Where rounding has left
   nothing of a direction, its row of R stays zero. */
void inverse_roots(int64_t count, int64_t r, float *U, float *R, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads)
    for (int64_t n = 0; n < count; n++) {
        float *const u = U + n * r * r, *const root = R + n * r * r;
        for (int64_t k0 = 0; k0 < r; k0 += SOME) {
            const int64_t next = min(k0 + SOME, r);
            for (int64_t k = k0; k < next; k++) {
                float *const row = u + k * r;
                const float pivot = row[k], inverse = pivot <= 0 ? 0 : 1 / sqrtf(pivot);
                root[k * r + k] = inverse;
                for (int64_t j = k; j < r; j++) row[j] *= inverse;
                for (int64_t i = k + 1; i < next; i++)
                    subtract(1, row + i, row, r, u + i * r, i, r);
            }
            const float *const rows = u + k0 * r;
            for (int64_t i = next; i < r; i++) subtract(SOME, rows + i, rows, r, u + i * r, i, r);
        }
        for (int64_t i = 0; i < r; i++) {
            float *const to = root + i * r;
            const float inverse = to[i];
            int64_t k = 0;
            to[i] = 0;
            for (; k + SOME <= i; k += SOME)
                subtract(SOME, u + k * r + i, root + k * r, r, to, 0, k + SOME);
            for (; k < i; k++) subtract(1, u + k * r + i, root + k * r, r, to, 0, k + 1);
            for (int64_t j = 0; j < i; j++) to[j] *= inverse;
            to[i] = inverse;
        }
    }
}

/* `Moments` of gradient.py, and what else an update is made of. Of a number there is a vector, with
   one for each matrix. */
typedef struct {
    int64_t count, rows, columns, height, threads; /* a thread takes `height` rows at a time */
    Matrices weights, grads, B[2], A[2];           /* column strides are one */
    int64_t rank[2];                               /* zero: no such product */
    int64_t in_m[2], in_v[2];                      /* whether it counts in m, its square in v */
    const float *a[2], *b, *c[2], *d;
    const float *row, *column;                     /* (count, rows) and (count, columns), or NULL */
    Matrices ema[2];                               /* all of m, all of v; or without data */
    const float *rate[2], *unbias[2];
    const float *lr, *decay;
    float scale, eps;                              /* g is `scale` times the gradient */
    const uint8_t *finite;                         /* or NULL */
    const int64_t *keys;                           /* or NULL: bfloat16 is rounded to nearest */
    const uint32_t *row_index, *column_index;      /* for the keys: an element has the sum */
    float *row_sums; /* of g^2, (count, rows), zero so far, or NULL */
    float *column_sums; /* the same of (count, parts of `height` rows, columns) */
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

/* Moves a moment kept in full towards g or, the second, g^2; `to` becomes its unbiased value. */
static void move(const Step *s, const int second, const Part *part, const float *g, float *to) {
    const float rate = s->rate[second][part->n], unbias = s->unbias[second][part->n];
    for (int64_t k = 0; k < part->h; k++, g += PANEL, to += PANEL) {
        float *const ema = (float *)element(&s->ema[second], part->n, part->i + k, part->j);
        prefetch(ema + PANEL);
        for (int64_t l = 0; l < part->w; l++) {
            /* No difference: of an infinite square it would be no number for ever. */
            ema[l] = (1 - rate) * ema[l] + rate * (second ? g[l] * g[l] : g[l]);
            to[l] = unbias * ema[l];
        }
    }
}

INLINE void update_lines(const Step *s, const Part *part, const int dtype, const int noisy,
                         const int64_t w) {
    const int64_t n = part->n;
    const float a0 = s->a[0][n], a1 = s->a[1][n], b = s->b[n];
    const float c0 = s->c[0][n], c1 = s->c[1][n], d = s->d[n];
    const float decay = s->decay[n], lr = s->lr[n], eps = s->eps;
    const uint32_t key = noisy ? (uint32_t)s->keys[n] : 0;
    for (int64_t k = 0; k < part->h; k++) {
        const float *const m0 = line_of(part->in_m[0], k), *const m1 = line_of(part->in_m[1], k);
        const float *const v0 = line_of(part->in_v[0], k), *const v1 = line_of(part->in_v[1], k);
        const float *const gm = line_of(part->g_in_m, k), *const gv = line_of(part->g_in_v, k);
        const float *const rest = line_of(part->rest, k), factor = part->row ? part->row[k] : 1;
        float *const x = (float *)element(&s->weights, n, part->i + k, part->j);
        uint16_t *const half = (uint16_t *)x;
        prefetch(element(&s->weights, n, part->i + k, part->j + PANEL));
        prefetch(element(&s->grads, n, part->i + k, part->j + PANEL));
        const uint32_t index = noisy ? s->row_index[part->i + k] : 0;
        const uint32_t *const places = noisy ? s->column_index + part->j : NULL;
        for (int64_t l = 0; l < w; l++) {
            const float m = a0 * m0[l] + a1 * m1[l] + b * gm[l];
            /* Weighed before they are squared: a square may be infinite, and a weight zero. */
            const float squares = (c0 * v0[l]) * v0[l] + (c1 * v1[l]) * v1[l];
            const float v = squares + d * (gv[l] * gv[l]) + factor * rest[l];
            const float new = decay * number(dtype, x, l) - lr * m / (sqrtf(v) + eps);
            if (dtype == FLOAT32) x[l] = new;
            else if (dtype == FLOAT16) half[l] = nearest_half(new);
            else if (noisy) half[l] = noisy_bfloat16(new, index + places[l], key);
            else half[l] = nearest_bfloat16(new);
        }
    }
}

INLINE void update_any(const Step *s, const Part *part, const int dtype, const int noisy) {
    if (part->w == PANEL) update_lines(s, part, dtype, noisy, PANEL); /* as in `load_any` */
    else update_lines(s, part, dtype, noisy, part->w);
}

static void update(const Step *s, const Part *part) {
    if (s->weights.dtype == FLOAT32) update_any(s, part, FLOAT32, 0);
    else if (s->weights.dtype == FLOAT16) update_any(s, part, FLOAT16, 0);
    else if (s->keys) update_any(s, part, BFLOAT16, 1);
    else update_any(s, part, BFLOAT16, 0);
}

/* The weights <- decay weights - lr m / (sqrt(v) + eps), sums of g^2; not where `finite` is 0. */
void step(const Step *s) {
    static const float zeros[PANEL] ALIGNED;
    const int64_t parts = blocks(s->rows, s->height);
#pragma omp parallel for schedule(static) num_threads((int)s->threads)
    for (int64_t item = 0; item < s->count * parts; item++) {
        float P[2][HEIGHT * PANEL] ALIGNED, panel[DEPTH * PANEL] ALIGNED, G[BAND * PANEL] ALIGNED;
        float of_rows[HEIGHT * LANES] ALIGNED; /* a vector of partial sums for each row */
        const int64_t n = item / parts, first = item % parts * s->height;
        const int64_t last = min(first + s->height, s->rows);
        if (s->finite && !s->finite[n]) continue;
        for (int64_t i0 = first; i0 < last; i0 += HEIGHT) {
            const int64_t h = min(HEIGHT, last - i0);
            memset(of_rows, 0, sizeof of_rows);
            for (int64_t j0 = 0; j0 < s->columns; j0 += PANEL) {
                const int64_t w = min(PANEL, s->columns - j0);
                float of_columns[PANEL] ALIGNED = {0};
                for (int x = 0; x < 2; x++)
                    for (int64_t k0 = 0; k0 < s->rank[x]; k0 += DEPTH) {
                        const int64_t K = min(DEPTH, s->rank[x] - k0), row = s->B[x].row;
                        const float *const B = element(&s->B[x], n, i0, k0);
                        load(&s->A[x], n, k0, K, j0, w, 1, panel, packed(w));
                        product(h, K, B, row, 1, panel, P[x], PANEL, w, k0 > 0);
                    }
                for (int64_t i = 0; i < h; i += BAND) {
                    Part part = {.n = n, .i = i0 + i, .h = min(BAND, h - i), .j = j0, .w = w};
                    const Lines nothing = {zeros, 0}, g = {G, PANEL};
                    load(&s->grads, n, part.i, part.h, j0, w, s->scale, G, PANEL);
                    if (s->row_sums) add_squares(G, part.h, of_rows + i * LANES, of_columns);
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
                for (int64_t k = 0; s->row_sums && k < w; k++) sums[k] += of_columns[k];
            }
            for (int64_t i = 0; s->row_sums && i < h; i++)
                for (int k = 0; k < LANES; k++)
                    s->row_sums[n * s->rows + i0 + i] += of_rows[i * LANES + k];
        }
    }
}
