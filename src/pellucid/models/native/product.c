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
        if (low)
            pack_panel(1, 0, columns, inputs, first, output_step, input_step, panel);
        else
            pack_panel(0, 0, columns, inputs, first, output_step, input_step, panel);
    }
}

INLINE void multiply(int low, int out_low, int64_t m, int64_t n, int64_t steps, const float *a, const float *packed,
                     const float *bias, void *c, int64_t add) {
    int64_t panels = (n + COLUMNS - 1) / COLUMNS;
#pragma omp parallel
    for (int64_t start = 0; start < m; start += BAND) {
        int64_t end = least(start + BAND, m);
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < panels; p++) {
            int64_t first = p * COLUMNS, columns = least(n - first, COLUMNS), i = start;
            const float *panel = packed + first * steps, *b = bias ? bias + first : 0;
            vec sums[ROWS][2];
#define SOME(rows)                                                                                         \
    for (; i + rows <= end; i += rows) {                                                                   \
        tile(rows, low, steps, a + i * steps, steps, 1, panel, sums);                                      \
        store(rows, sums, b, at(c, i * n + first, out_low), n, columns, add, out_low);                     \
    }
            SOME(ROWS)
            SOME(4)
            SOME(1)
        }
    }
}

/* c (m, n) = a (m, depth) . weight^T + bias, or c += that. packed: the weight (n, depth), as `pack` lays it out. bias: (n,) or null.
 * low: a is bfloat16, and depth is even. out_low: c is bfloat16. */
void product(int64_t low, int64_t out_low, int64_t m, int64_t n, int64_t depth, const void *a, const void *packed, const float *bias,
             void *c, int64_t add) {
    if (low && out_low)
        multiply(1, 1, m, n, depth / 2, a, packed, bias, c, add);
    else if (low)
        multiply(1, 0, m, n, depth / 2, a, packed, bias, c, add);
    else
        multiply(0, 0, m, n, depth, a, packed, bias, c, add);
}

/* ---- the gradient of a weight ---- */

enum { GROUP = 4 * ROWS, TOKENS = 256 };

/* Floats of scratch that `weight_gradient` needs. */
int64_t weight_gradient_scratch(int64_t inputs) { return (inputs + COLUMNS - 1) / COLUMNS * TOKENS * COLUMNS; }

/* `count` columns of dy over `tokens`, as units (step, GROUP); zeros beyond. */
INLINE void pack_group(int low, int64_t tokens, int64_t count, const void *dy, int64_t row, float *out) {
    int64_t steps = low ? (tokens + 1) / 2 : tokens;
    for (int64_t k = 0; k < steps; k++, out += GROUP) {
        const void *even = at(dy, (low ? 2 * k : k) * row, low), *odd = at(even, row, low);
        int paired = 2 * k + 1 < tokens;
        int64_t j = 0;
        if (!low)
            for (; j < count; j++) out[j] = ((const float *)even)[j];
        else {
            for (; paired && j + LANES <= count; j += LANES) {
                uvec first = __builtin_convertvector(*(const low_vec *)((const uint16_t *)even + j), uvec);
                uvec second = __builtin_convertvector(*(const low_vec *)((const uint16_t *)odd + j), uvec);
                *(uvec *)(out + j) = first | second << 16;
            }
            for (; j < count; j++) {
                uint32_t pair = ((const uint16_t *)even)[j] | (paired ? (uint32_t)((const uint16_t *)odd)[j] << 16 : 0);
                memcpy(out + j, &pair, 4);
            }
        }
        for (; j < GROUP; j++) out[j] = 0;
    }
}

INLINE void outer(int low, int64_t n, int64_t outputs, int64_t inputs, const void *dy, const void *x, float *scratch, float *dw,
                  int64_t add) {
    int64_t panels = (inputs + COLUMNS - 1) / COLUMNS, groups = (outputs + GROUP - 1) / GROUP;
#pragma omp parallel
    for (int64_t start = 0; start < n; start += TOKENS) {
        int64_t tokens = least(n - start, TOKENS), steps = low ? (tokens + 1) / 2 : tokens;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++)
            pack_panel(low, low, least(inputs - p * COLUMNS, COLUMNS), tokens, at(x, start * inputs + p * COLUMNS, low), 1, inputs,
                       scratch + p * steps * COLUMNS);
        float group[TOKENS * GROUP]; /* half of it if low */
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; g++) {
            int64_t first = g * GROUP, count = least(outputs - first, GROUP);
            pack_group(low, tokens, count, at(dy, start * outputs + first, low), outputs, group);
            for (int64_t p = 0; p < panels; p++)
                for (int64_t r = 0; r < count; r += ROWS) {
                    vec sums[ROWS][2];
                    float *out = dw + (first + r) * inputs + p * COLUMNS;
                    int64_t columns = least(inputs - p * COLUMNS, COLUMNS);
                    tile(ROWS, low, steps, group + r, 1, GROUP, scratch + p * steps * COLUMNS, sums);
                    if (r + ROWS <= count)
                        store(ROWS, sums, 0, out, inputs, columns, add || start, 0);
                    else
                        for (int64_t i = r; i < count; i++) store(1, sums + i - r, 0, out + (i - r) * inputs, inputs, columns, add || start, 0);
                }
        }
    }
}

/* dw (outputs, inputs) = dy (n, outputs)^T . x (n, inputs), or dw += that: summed over the n tokens in float32. low: dy and x are
 * bfloat16. scratch: floats, weight_gradient_scratch(inputs). n must be above 0. */
void weight_gradient(int64_t low, int64_t n, int64_t outputs, int64_t inputs, const void *dy, const void *x, float *scratch, float *dw,
                     int64_t add) {
    low ? outer(1, n, outputs, inputs, dy, x, scratch, dw, add) : outer(0, n, outputs, inputs, dy, x, scratch, dw, add);
}
