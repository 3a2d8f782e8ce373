/* Matrix products over weights that are laid out once (`pack`), and the gradient of a weight. */

#include "product.h"

/* Rows at a time, so that they stay in the second-level cache while every panel passes. */
enum { BAND = 120 };

int64_t panel_columns(void) { return COLUMNS; }

int64_t has_bfloat16(void) {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

/* A weight in panels of COLUMNS outputs, (panels, steps, COLUMNS) units, for `product`. Element (output j, input k) of the float32
 * weight is weight[j * output_step + k * input_step]: the transposed weight needs no copy. */
void pack(int64_t low, int64_t outputs, int64_t inputs, const float *weight, int64_t output_step, int64_t input_step, float *packed) {
    int64_t panels = (outputs + COLUMNS - 1) / COLUMNS, steps = low ? (inputs + 1) / 2 : inputs;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        const float *first = weight + p * COLUMNS * output_step;
        int64_t columns = least(outputs - p * COLUMNS, COLUMNS);
        float *panel = packed + p * steps * COLUMNS;
        low ? pack_floats(1, columns, inputs, first, output_step, input_step, panel)
            : pack_floats(0, columns, inputs, first, output_step, input_step, panel);
    }
}

/* The rows of one band times one panel. c: at the first of both. */
INLINE void multiply(int low, int out_low, int64_t m, int64_t steps, const float *a, const float *panel, const float *bias, void *c,
                     int64_t n, int64_t columns, int add) {
    vec sums[ROWS][2];
    int64_t i = 0;
#define EACH(rows)                                                                \
    for (; i + (rows) <= m; i += (rows)) {                                        \
        tile(rows, 2, low, steps, a + i * steps, steps, 1, panel, sums);          \
        store(rows, sums, bias, at(c, i * n, out_low), n, columns, add, out_low); \
    }
    EACH(ROWS)
    EACH(2 * ROWS / 3) /* what is left in at most two steps: one row alone costs about as much as three */
    EACH(4)
    EACH(3)
    EACH(2)
    EACH(1)
#undef EACH
}

/* Functions of their own, or OpenMP makes variables of the constants. */
OWN void multiply_float32(int64_t m, int64_t steps, const float *a, const float *panel, const float *bias, void *c, int64_t n,
                          int64_t columns, int add) {
    multiply(0, 0, m, steps, a, panel, bias, c, n, columns, add);
}

OWN void multiply_low(int64_t m, int64_t steps, const float *a, const float *panel, const float *bias, void *c, int64_t n,
                      int64_t columns, int add) {
    multiply(1, 0, m, steps, a, panel, bias, c, n, columns, add);
}

OWN void multiply_low_to_low(int64_t m, int64_t steps, const float *a, const float *panel, const float *bias, void *c, int64_t n,
                             int64_t columns, int add) {
    multiply(1, 1, m, steps, a, panel, bias, c, n, columns, add);
}

/* c (m, n) = a (m, depth) . weight^T + bias, or c += that. packed: the weight (n, depth), as `pack` lays it out. bias: (n,) or null.
 * low: a is bfloat16, and depth is even. out_low: c is bfloat16. */
void product(int64_t low, int64_t out_low, int64_t m, int64_t n, int64_t depth, const float *a, const float *packed, const float *bias,
             void *c, int64_t add) {
    int64_t panels = (n + COLUMNS - 1) / COLUMNS, steps = low ? depth / 2 : depth;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t start = 0; start < m; start += BAND)
        for (int64_t p = 0; p < panels; p++) {
            int64_t first = p * COLUMNS;
            (low ? out_low ? multiply_low_to_low : multiply_low : multiply_float32)(
                least(m - start, BAND), steps, a + start * steps, packed + first * steps, bias ? bias + first : 0,
                at(c, start * n + first, out_low), n, least(n - first, COLUMNS), add);
        }
}

/* ---- the gradient of a weight ---- */

enum { GROUP = 4 * ROWS, TOKENS = 256 };

/* Floats of scratch that `weight_gradient` needs. */
int64_t weight_gradient_scratch(int64_t inputs) { return (inputs + COLUMNS - 1) / COLUMNS * TOKENS * COLUMNS; }

/* The part of the gradient that some columns of dy make over some tokens. dw: at the first of them. group: scratch. */
INLINE void outer(int low, int64_t tokens, int64_t count, const void *dy, int64_t outputs, int64_t inputs, const float *packed,
                  float *group, float *dw, int add) {
    int64_t steps = low ? (tokens + 1) / 2 : tokens;
    pack_depth(low, GROUP, count, tokens, dy, outputs, group);
    for (int64_t p = 0; p < inputs; p += COLUMNS)
        for (int64_t r = 0; r < count; r += ROWS) {
            vec sums[ROWS][2];
            int64_t columns = least(inputs - p, COLUMNS);
            float *out = dw + r * inputs + p;
            tile(ROWS, 2, low, steps, group + r, 1, GROUP, packed + p * steps, sums);
            if (r + ROWS <= count)
                store(ROWS, sums, 0, out, inputs, columns, add, 0);
            else
                for (int64_t i = 0; i < count - r; i++) store(1, sums + i, 0, out + i * inputs, inputs, columns, add, 0);
        }
}

OWN void outer_float32(int64_t tokens, int64_t count, const void *dy, int64_t outputs, int64_t inputs, const float *packed, float *group,
                       float *dw, int add) {
    outer(0, tokens, count, dy, outputs, inputs, packed, group, dw, add);
}

OWN void outer_low(int64_t tokens, int64_t count, const void *dy, int64_t outputs, int64_t inputs, const float *packed, float *group,
                   float *dw, int add) {
    outer(1, tokens, count, dy, outputs, inputs, packed, group, dw, add);
}

/* dw (outputs, inputs) = dy (n, outputs)^T . x (n, inputs), or dw += that: summed over the n tokens in float32. low: dy and x are
 * bfloat16. scratch: floats, weight_gradient_scratch(inputs). n must be above 0. */
void weight_gradient(int64_t low, int64_t n, int64_t outputs, int64_t inputs, const void *dy, const void *x, float *scratch, float *dw,
                     int64_t add) {
#pragma omp parallel
    for (int64_t start = 0; start < n; start += TOKENS) {
        int64_t tokens = least(n - start, TOKENS), steps = low ? (tokens + 1) / 2 : tokens;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < inputs; p += COLUMNS)
            low ? pack_depth(1, COLUMNS, least(inputs - p, COLUMNS), tokens, at(x, start * inputs + p, 1), inputs, scratch + p * steps)
                : pack_depth(0, COLUMNS, least(inputs - p, COLUMNS), tokens, at(x, start * inputs + p, 0), inputs, scratch + p * steps);
        float group[TOKENS * GROUP]; /* half of it if low */
#pragma omp for schedule(static)
        for (int64_t g = 0; g < outputs; g += GROUP)
            (low ? outer_low : outer_float32)(tokens, least(outputs - g, GROUP), at(dy, start * outputs + g, low), outputs, inputs,
                                              scratch, group, dw + g * inputs, add || start);
    }
}
