// Products of activations with packed weights, in one order of summation.
//
// For each 32 inputs: t = sum of x * code, one after the other, fused; then y = t * scale + y and
// y = (sum of the 32 x) * bias + y, fused. So a row's result does not depend on how many rows there
// are, nor on which of the two ways below computes it, nor on threads or the width of vectors:
//
// - few rows: codes go from memory through registers into the products;
// - many rows: a panel of codes, converted once, lies in the L1 cache beside tiles of the rows.
//
// A 4-bit code is masked in place and not shifted: it is then the code times a power of 2, which
// `Scaled` has divided out of x beforehand, exactly.
#pragma once
#include "threads.h"
#include "weights.h"

#if VL == 16
#define PANEL_VECTORS 2
#define TILE_ROWS 12
#elif VL == 8
#define PANEL_VECTORS 2
#define TILE_ROWS 6
#else
#define PANEL_VECTORS 4
#define TILE_ROWS 6
#endif
#define PANEL_OUTPUTS (PANEL_VECTORS * VL)
#define PANEL_INPUTS 288
#define FEW_ROWS 16  // up to so many, four at a time are faster than a panel (measured, AVX2)
#define UNROLL _Pragma("GCC unroll 32")

struct Panel {
  alignas(64) float codes[PANEL_INPUTS * PANEL_OUTPUTS];
  alignas(64) float scales[PANEL_INPUTS / SUB * PANEL_OUTPUTS];
  alignas(64) float biases[PANEL_INPUTS / SUB * PANEL_OUTPUTS];
};

// Activations as a product takes them: for affine weights scaled by the powers of 2 of their codes'
// places, and with the sums of each 32. Few rows lie as x does, (rows, num_inputs). Many lie in
// tiles of TILE_ROWS, (tiles, num_inputs, TILE_ROWS), so that a tile is read from end to end; rows
// behind the last are 0. Sums lie likewise.
struct Rows {
  const float *x, *sums;
  int num_rows, num_inputs;
};

INLINE bool is_tiled(int num_rows) { return num_rows > FEW_ROWS; }
INLINE int num_tiles(int num_rows) { return (num_rows + TILE_ROWS - 1) / TILE_ROWS; }
// Of rows that a buffer must have room for.
INLINE int64_t padded_rows(int num_rows) {
  return is_tiled(num_rows) ? (int64_t)num_tiles(num_rows) * TILE_ROWS : num_rows;
}

template <int BITS>
INLINE float place(int k) {
  return 1.0f / (float)(1u << (BITS * (k % (16 / BITS))));
}

// The sum of 32 floats: 8 partial sums, then the tree.
INLINE float sum_of_sub(const float* x) {
  return sum8(((load8(x) + load8(x + 8)) + load8(x + 16)) + load8(x + 24));
}

template <int BITS>
static void scale_row(const float* x, int num_inputs, float* scaled, float* sums) {
  float places[SUB];
  for (int k = 0; k < SUB; k++) places[k] = place<BITS>(k);
  for (int i = 0; i < num_inputs; i += SUB) {
    sums[i / SUB] = sum_of_sub(x + i);
    for (int k = 0; k < SUB; k += 8) store8(scaled + i + k, load8(x + i + k) * load8(places + k));
  }
}

// A tile of up to TILE_ROWS rows; BITS is 0 for plain weights, which need neither places nor sums.
template <int BITS>
static void scale_tile(const float* x, int num_rows, int num_inputs, float* tile, float* sums) {
  constexpr int N = TILE_ROWS;
  for (int i = 0; i < num_inputs; i += SUB, tile += SUB * N) {
    for (int m = 0; m < N; m++) {
      const float* from = x + (int64_t)m * num_inputs + i;
      if (BITS) sums[i / SUB * N + m] = m < num_rows ? sum_of_sub(from) : 0.0f;
      UNROLL for (int k = 0; k < SUB; k++)
        tile[k * N + m] = m < num_rows ? from[k] * (BITS ? place<BITS ? BITS : 8>(k) : 1.0f) : 0.0f;
    }
  }
}

template <int SCALE>
INLINE vf load_scale(const uint16_t* p) {
  return SCALE == KW_SCALE_FLOAT16 ? from_f16(p) : from_bf16(p);
}

// ---- codes of 32 inputs for NV vectors of outputs: calls f(k, codes[NV])

template <int BITS, int NV, class F>
INLINE void affine_codes(const uint32_t* words, F f) {
  constexpr int HALF = 16 / BITS;
  _Pragma("GCC unroll 1") for (int w = 0; w < BITS; w++, words += BLOCK) {
    _Pragma("GCC unroll 2") for (int h = 0; h < 2; h++) {
      UNROLL for (int i = 0; i < HALF; i++) {
        vf codes[NV];
        UNROLL for (int v = 0; v < NV; v++) {
          vu q = load(words + v * VL);
          if (h) q >>= 16;
          codes[v] = to_float(q & (((1u << BITS) - 1) << (BITS * i)));
        }
        f(w * 2 * HALF + h * HALF + i, codes);
      }
    }
  }
}

template <int KIND, int NV, class F>
INLINE void plain_codes(const uint8_t* p, F f) {
  _Pragma("GCC unroll 4") for (int k = 0; k < SUB; k++) {
    vf codes[NV];
    UNROLL for (int v = 0; v < NV; v++)
      codes[v] = KIND == KW_FLOAT32   ? load((const float*)p + k * BLOCK + v * VL)
                 : KIND == KW_FLOAT16 ? from_f16((const uint16_t*)p + k * BLOCK + v * VL)
                                      : from_bf16((const uint16_t*)p + k * BLOCK + v * VL);
    f(k, codes);
  }
}

// A weight's kind at compile time: where the codes, scales and biases of a block's SUBs are.
template <int BITS, int GROUP, int SCALE>
struct Affine {
  static constexpr bool HAS_SCALE = true;
  static constexpr int SUBS = GROUP / SUB;
  const uint8_t* block;
  INLINE_MEMBER const uint8_t* group(int s) const {
    return block + s / SUBS * (int64_t)(GROUP * BITS / 8 * BLOCK + 4 * BLOCK);
  }
  template <int NV, class F>
  INLINE_MEMBER void codes(int s, int output, F f) const {
    affine_codes<BITS, NV>((const uint32_t*)group(s) + s % SUBS * BITS * BLOCK + output, f);
  }
  INLINE_MEMBER vf scale(int s, int output) const {
    return load_scale<SCALE>((const uint16_t*)(group(s) + GROUP * BITS / 8 * BLOCK) + output);
  }
  INLINE_MEMBER vf bias(int s, int output) const { return scale(s, output + BLOCK); }
};

template <int KIND>
struct Plain {
  static constexpr bool HAS_SCALE = false;
  const uint8_t* block;
  template <int NV, class F>
  INLINE_MEMBER void codes(int s, int output, F f) const {
    constexpr int BYTES = KIND == KW_FLOAT32 ? 4 : 2;
    plain_codes<KIND, NV>(block + ((int64_t)s * SUB * BLOCK + output) * BYTES, f);
  }
  INLINE_MEMBER vf scale(int, int) const { return all(1.0f); }
  INLINE_MEMBER vf bias(int, int) const { return all(0.0f); }
};

// ---- few rows

template <int M, int NV, class W>
INLINE void few_rows(const W& w, int output, const Rows& rows, int first_row, float* y, int y_stride) {
  const int num_subs = rows.num_inputs / SUB;
  const float* x = rows.x + (int64_t)first_row * rows.num_inputs;
  const float* sums = W::HAS_SCALE ? rows.sums + (int64_t)first_row * num_subs : nullptr;
  vf acc[M][NV] = {};
  for (int s = 0; s < num_subs; s++) {
    vf t[M][NV] = {};
    const float* xs = x + s * SUB;
    w.template codes<NV>(s, output, [&](int k, const vf* codes) LAMBDA {
      UNROLL for (int m = 0; m < M; m++) {
        vf xk = all(xs[(int64_t)m * rows.num_inputs + k]);
        UNROLL for (int v = 0; v < NV; v++) t[m][v] = fma(xk, codes[v], t[m][v]);
      }
    });
    UNROLL for (int v = 0; v < NV; v++) {
      if (!W::HAS_SCALE) {
        UNROLL for (int m = 0; m < M; m++) acc[m][v] += t[m][v];
        continue;
      }
      vf scale = w.scale(s, output + v * VL), bias = w.bias(s, output + v * VL);
      UNROLL for (int m = 0; m < M; m++) {
        acc[m][v] = fma(t[m][v], scale, acc[m][v]);
        acc[m][v] = fma(all(sums[(int64_t)m * num_subs + s]), bias, acc[m][v]);
      }
    }
  }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int v = 0; v < NV; v++) store(y + (int64_t)m * y_stride + v * VL, acc[m][v]);
}

// As many vectors of outputs at a time as the registers hold.
template <int M, class W>
static void few_rows_of_block(const W& w, const Rows& rows, int first_row, float* y, int y_stride) {
  constexpr int ALL = BLOCK / VL;
#if VL == 16
  constexpr int NV = ALL;
#elif VL == 8
  constexpr int NV = M <= 1 ? ALL : 2;
#else
  constexpr int NV = M <= 2 ? ALL : 4;
#endif
  for (int v = 0; v < ALL; v += NV)
    few_rows<M, NV>(w, v * VL, rows, first_row, y + v * VL, y_stride);
}

// ---- many rows

template <class W>
static void fill(Panel* panel, const W& w, int first_sub, int num_subs, int output) {
  for (int s = 0; s < num_subs; s++) {
    float* to = panel->codes + s * SUB * PANEL_OUTPUTS;
    w.template codes<PANEL_VECTORS>(first_sub + s, output, [&](int k, const vf* codes) LAMBDA {
      UNROLL for (int v = 0; v < PANEL_VECTORS; v++) store(to + k * PANEL_OUTPUTS + v * VL, codes[v]);
    });
    if (!W::HAS_SCALE) continue;
    for (int v = 0; v < PANEL_VECTORS; v++) {
      int to_scale = s * PANEL_OUTPUTS + v * VL;
      store(panel->scales + to_scale, w.scale(first_sub + s, output + v * VL));
      store(panel->biases + to_scale, w.bias(first_sub + s, output + v * VL));
    }
  }
}

// Add the panel's products with a tile of rows to y, of which `num_rows` are written.
template <bool HAS_SCALE>
INLINE void tile_product(const Panel* panel, int num_subs, const float* x, const float* sums,
                         float* y, int y_stride, int num_rows, bool is_first) {
  constexpr int M = TILE_ROWS, NV = PANEL_VECTORS;
  vf acc[M][NV];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int v = 0; v < NV; v++)
      acc[m][v] = is_first || m >= num_rows ? vf{} : load(y + (int64_t)m * y_stride + v * VL);
  const float* codes = panel->codes;
  for (int s = 0; s < num_subs; s++) {
    vf t[M][NV] = {};
    _Pragma("GCC unroll 4") for (int k = 0; k < SUB; k++, x += M, codes += PANEL_OUTPUTS) {
      vf c[NV];
      UNROLL for (int v = 0; v < NV; v++) c[v] = load(codes + v * VL);
      UNROLL for (int m = 0; m < M; m++) {
        vf xk = all(x[m]);
        UNROLL for (int v = 0; v < NV; v++) t[m][v] = fma(xk, c[v], t[m][v]);
      }
    }
    UNROLL for (int v = 0; v < NV; v++) {
      if (!HAS_SCALE) {
        UNROLL for (int m = 0; m < M; m++) acc[m][v] += t[m][v];
        continue;
      }
      vf scale = load(panel->scales + s * PANEL_OUTPUTS + v * VL);
      vf bias = load(panel->biases + s * PANEL_OUTPUTS + v * VL);
      UNROLL for (int m = 0; m < M; m++) {
        acc[m][v] = fma(t[m][v], scale, acc[m][v]);
        acc[m][v] = fma(all(sums[s * M + m]), bias, acc[m][v]);
      }
    }
  }
  UNROLL for (int m = 0; m < M; m++)
    if (m < num_rows)
      UNROLL for (int v = 0; v < NV; v++) store(y + (int64_t)m * y_stride + v * VL, acc[m][v]);
}

template <class W>
static void many_rows_of_block(const W& w, const Rows& rows, float* y, int y_stride, Panel* panel) {
  const int num_subs = rows.num_inputs / SUB;
  for (int first = 0; first < num_subs; first += PANEL_INPUTS / SUB) {
    const int n = num_subs - first < PANEL_INPUTS / SUB ? num_subs - first : PANEL_INPUTS / SUB;
    for (int output = 0; output < BLOCK; output += PANEL_OUTPUTS) {
      fill(panel, w, first, n, output);
      for (int row = 0; row < rows.num_rows; row += TILE_ROWS) {
        const float* x = rows.x + (int64_t)row * rows.num_inputs + first * SUB * TILE_ROWS;
        const float* sums = rows.sums + (int64_t)row * num_subs + first * TILE_ROWS;
        tile_product<W::HAS_SCALE>(panel, n, x, sums, y + (int64_t)row * y_stride + output,
                                   y_stride, rows.num_rows - row, first == 0);
      }
    }
  }
}

template <class W>
static void block_product(const W& w, const Rows& rows, float* y, int y_stride, Panel* panel) {
  if (is_tiled(rows.num_rows)) return many_rows_of_block(w, rows, y, y_stride, panel);
  for (int row = 0; row < rows.num_rows;) {
    float* to = y + (int64_t)row * y_stride;
    switch (rows.num_rows - row) {
      case 1:
        return few_rows_of_block<1>(w, rows, row, to, y_stride);
      case 2:
        return few_rows_of_block<2>(w, rows, row, to, y_stride);
      case 3:
        return few_rows_of_block<3>(w, rows, row, to, y_stride);
      default:
        few_rows_of_block<4>(w, rows, row, to, y_stride);
        row += 4;
    }
  }
}

// y (rows, 32) of one block of outputs; without the weight's own bias.
static void product(const KwWeight& w, int block, const Rows& rows, float* y, int y_stride,
                    Panel* panel) {
  const uint8_t* p = block_of(w, block);
#define AFFINE(BITS, GROUP, SCALE) \
  return block_product(Affine<BITS, GROUP, SCALE>{p}, rows, y, y_stride, panel)
#define AFFINE_OF(BITS)                                                             \
  if (w.group == 32 && w.scale == KW_SCALE_FLOAT16) AFFINE(BITS, 32, KW_SCALE_FLOAT16); \
  if (w.group == 32) AFFINE(BITS, 32, KW_SCALE_BFLOAT16);                           \
  if (w.scale == KW_SCALE_FLOAT16) AFFINE(BITS, 64, KW_SCALE_FLOAT16);              \
  AFFINE(BITS, 64, KW_SCALE_BFLOAT16)
  switch (w.kind) {
    case KW_AFFINE4:
      AFFINE_OF(4);
    case KW_AFFINE8:
      AFFINE_OF(8);
    case KW_FLOAT32:
      return block_product(Plain<KW_FLOAT32>{p}, rows, y, y_stride, panel);
    case KW_FLOAT16:
      return block_product(Plain<KW_FLOAT16>{p}, rows, y, y_stride, panel);
    default:
      return block_product(Plain<KW_BFLOAT16>{p}, rows, y, y_stride, panel);
  }
#undef AFFINE
#undef AFFINE_OF
}
