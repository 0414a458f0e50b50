// Weights as the kernels read them.
//
// A matrix is cut into blocks of 32 outputs. An affine block holds, for each group of inputs, MLX's
// own words with the outputs side by side, so that a lane of a vector is an output; the group's
// scales and biases lie behind them as 16-bit floats. A plain block holds 32 outputs side by side
// for each input. Nothing is ever dequantised in memory but a panel that fits the L1 cache.
#pragma once
#include "abi.h"
#include "simd.h"

#define BLOCK 32  // outputs in a block
#define SUB 32    // inputs that are summed before a scale is applied, whatever the group

INLINE int num_blocks(const KwWeight& w) { return w.num_outputs / BLOCK; }
INLINE bool is_affine(int kind) { return kind == KW_AFFINE4 || kind == KW_AFFINE8; }
INLINE int bits_of(int kind) { return kind == KW_AFFINE4 ? 4 : 8; }
INLINE int64_t group_bytes(int bits, int group) { return (int64_t)group * bits / 8 * BLOCK + 4 * BLOCK; }

INLINE int64_t block_bytes(int kind, int group, int num_inputs) {
  if (is_affine(kind)) return num_inputs / group * group_bytes(bits_of(kind), group);
  return (int64_t)num_inputs * BLOCK * (kind == KW_FLOAT32 ? 4 : 2);
}
INLINE const uint8_t* block_of(const KwWeight& w, int block) {
  return w.data + block * block_bytes(w.kind, w.group, w.num_inputs);
}

static bool is_packable(int kind, int group, int num_outputs, int num_inputs) {
  if (kind < KW_AFFINE4 || kind > KW_BFLOAT16) return false;
  if (num_outputs <= 0 || num_inputs <= 0 || num_outputs % BLOCK || num_inputs % SUB) return false;
  return !is_affine(kind) || ((group == 32 || group == 64) && num_inputs % group == 0);
}

static void pack_affine(int bits, int group, int num_outputs, int num_inputs, const uint32_t* words,
                        const uint16_t* scales, const uint16_t* biases, uint8_t* packed) {
  const int num_groups = num_inputs / group, words_in_group = group * bits / 32;
  const int64_t words_in_row = (int64_t)num_groups * words_in_group;
  for (int block = 0; block < num_outputs / BLOCK; block++)
    for (int g = 0; g < num_groups; g++, packed += group_bytes(bits, group)) {
      uint32_t* to_words = (uint32_t*)packed;
      uint16_t* to_scales = (uint16_t*)(to_words + words_in_group * BLOCK);
      for (int lane = 0; lane < BLOCK; lane++) {
        int64_t row = (int64_t)block * BLOCK + lane;
        for (int i = 0; i < words_in_group; i++)
          to_words[i * BLOCK + lane] = words[row * words_in_row + g * words_in_group + i];
        to_scales[lane] = scales[row * num_groups + g];
        to_scales[BLOCK + lane] = biases[row * num_groups + g];
      }
    }
}

template <class Number>
static void pack_plain(int num_outputs, int num_inputs, const Number* numbers, Number* packed) {
  for (int block = 0; block < num_outputs / BLOCK; block++)
    for (int k = 0; k < num_inputs; k++)
      for (int lane = 0; lane < BLOCK; lane++)
        *packed++ = numbers[((int64_t)block * BLOCK + lane) * num_inputs + k];
}

// One row of an embedding, from its packed block: code * scale + bias, fused.
static void unpack_row(const KwWeight& w, int row, float* out) {
  const uint8_t* p = block_of(w, row / BLOCK);
  const int lane = row % BLOCK;
  if (!is_affine(w.kind)) {
    for (int k = 0; k < w.num_inputs; k++) {
      int64_t i = (int64_t)k * BLOCK + lane;
      out[k] = w.kind == KW_FLOAT32   ? ((const float*)p)[i]
               : w.kind == KW_FLOAT16 ? one_from_f16(((const uint16_t*)p)[i])
                                      : one_from_bf16(((const uint16_t*)p)[i]);
    }
    return;
  }
  const int bits = bits_of(w.kind), per_word = 32 / bits, words_in_group = w.group / per_word;
  for (int g = 0; g < w.num_inputs / w.group; g++, p += group_bytes(bits, w.group)) {
    const uint32_t* words = (const uint32_t*)p;
    const uint16_t* scales = (const uint16_t*)(words + words_in_group * BLOCK);
    auto one = w.scale == KW_SCALE_FLOAT16 ? one_from_f16 : one_from_bf16;
    const float scale = one(scales[lane]), bias = one(scales[BLOCK + lane]);
    for (int i = 0; i < words_in_group; i++) {
      uint32_t word = words[i * BLOCK + lane];
      for (int j = 0; j < per_word; j++, word >>= bits)
        *out++ = __builtin_fmaf((float)(word & ((1u << bits) - 1)), scale, bias);
    }
  }
}
