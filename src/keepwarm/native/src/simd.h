// Vectors of the widest kind that the instruction set has, under one set of names.
//
// `vf` has VL floats, one for each output of a product or each position of a head; how wide it is
// changes no result. `f8` has 8 floats on every machine: sums over a row run in 8 partial sums and
// then in a tree, so that they are the same bits everywhere. Nothing is contracted by the compiler
// (-ffp-contract=off): what is fused says `fma`.
#pragma once
#include <stdint.h>
#include <string.h>

// A test compiles with -DVL=16 for AVX2: AVX-512's code, of which each vector is two halves.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define VL 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#ifndef VL
#define VL 8
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#define VL 4
#else
#error "needs x86-64-v3 or aarch64"
#endif

#define INLINE static inline __attribute__((always_inline))
#define LAMBDA __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef float vf_unaligned __attribute__((vector_size(VL * 4), aligned(4)));
typedef uint32_t vu_unaligned __attribute__((vector_size(VL * 4), aligned(4)));
typedef float f8_unaligned __attribute__((vector_size(32), aligned(4)));

INLINE vf load(const float* p) { return *(const vf_unaligned*)p; }
INLINE void store(float* p, vf v) { *(vf_unaligned*)p = v; }
INLINE vu load(const uint32_t* p) { return *(const vu_unaligned*)p; }
INLINE f8 load8(const float* p) { return *(const f8_unaligned*)p; }
INLINE void store8(float* p, f8 v) { *(f8_unaligned*)p = v; }
INLINE vf all(float x) { return x - vf{}; }
INLINE f8 all8(float x) { return x - f8{}; }
INLINE vf to_float(vu v) { return __builtin_convertvector((vi)v, vf); }

// Of two halves each, where the instruction set has nothing wider.
template <class Half, class Whole, class F>
INLINE Whole by_halves(Whole a, Whole b, Whole c, F f) {
  Half x[2], y[2], z[2];
  memcpy(x, &a, sizeof a), memcpy(y, &b, sizeof b), memcpy(z, &c, sizeof c);
  z[0] = f(x[0], y[0], z[0]), z[1] = f(x[1], y[1], z[1]);
  memcpy(&c, z, sizeof c);
  return c;
}

#if defined(__x86_64__)
INLINE f8 fma(f8 a, f8 b, f8 c) { return (f8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#if defined(__AVX512F__)
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif VL == 16
INLINE vf fma(vf a, vf b, vf c) {
  return by_halves<f8>(a, b, c, [](f8 x, f8 y, f8 z) LAMBDA { return fma(x, y, z); });
}
#endif
#else
INLINE vf fma(vf a, vf b, vf c) {
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
INLINE f8 fma(f8 a, f8 b, f8 c) {
  return by_halves<vf>(a, b, c, [](vf x, vf y, vf z) LAMBDA { return fma(x, y, z); });
}
#endif

// ---- 16-bit floats: to float exactly, from float to the nearest, ties to even

#if VL == 4
INLINE vf from_f16(const uint16_t* p) {
  float16x4_t h;
  memcpy(&h, p, 8);
  return (vf)vcvt_f32_f16(h);
}
INLINE f8 f8_from_f16(const uint16_t* p) {
  vf low = from_f16(p), high = from_f16(p + 4);
  f8 both;
  memcpy(&both, &low, 16), memcpy((char*)&both + 16, &high, 16);
  return both;
}
INLINE void to_f16(uint16_t* p, f8 v) {
  float32x4_t low, high;
  memcpy(&low, &v, 16), memcpy(&high, (char*)&v + 16, 16);
  float16x4_t l = vcvt_f16_f32(low), h = vcvt_f16_f32(high);
  memcpy(p, &l, 8), memcpy(p + 4, &h, 8);
}
INLINE float one_from_f16(uint16_t bits) {
  __fp16 h;
  memcpy(&h, &bits, 2);
  return h;
}
#else
INLINE f8 f8_from_f16(const uint16_t* p) {
  return (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
#if defined(__AVX512F__)
INLINE vf from_f16(const uint16_t* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
#elif VL == 16
INLINE vf from_f16(const uint16_t* p) {
  f8 halves[2] = {f8_from_f16(p), f8_from_f16(p + 8)};
  vf both;
  memcpy(&both, halves, sizeof both);
  return both;
}
#else
INLINE vf from_f16(const uint16_t* p) { return f8_from_f16(p); }
#endif
INLINE void to_f16(uint16_t* p, f8 v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
INLINE float one_from_f16(uint16_t bits) { return _cvtsh_ss(bits); }
#endif

typedef uint16_t vh __attribute__((vector_size(VL * 2), aligned(2)));
INLINE vf from_bf16(const uint16_t* p) {
  return (vf)(__builtin_convertvector(*(const vh*)p, vu) << 16);
}
INLINE float one_from_bf16(uint16_t bits) {
  uint32_t word = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// ---- sums and maxima over 8 lanes, always by the same tree

INLINE float sum8(f8 v) {
  float a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
  return (a + c) + (b + d);
}

// The sums of eight vectors, each by the tree of `sum8`.
#if VL != 4
INLINE f8 sums8(f8 v0, f8 v1, f8 v2, f8 v3, f8 v4, f8 v5, f8 v6, f8 v7) {
  __m256 a = _mm256_add_ps(_mm256_permute2f128_ps((__m256)v0, (__m256)v4, 0x20),
                           _mm256_permute2f128_ps((__m256)v0, (__m256)v4, 0x31));
  __m256 b = _mm256_add_ps(_mm256_permute2f128_ps((__m256)v1, (__m256)v5, 0x20),
                           _mm256_permute2f128_ps((__m256)v1, (__m256)v5, 0x31));
  __m256 c = _mm256_add_ps(_mm256_permute2f128_ps((__m256)v2, (__m256)v6, 0x20),
                           _mm256_permute2f128_ps((__m256)v2, (__m256)v6, 0x31));
  __m256 d = _mm256_add_ps(_mm256_permute2f128_ps((__m256)v3, (__m256)v7, 0x20),
                           _mm256_permute2f128_ps((__m256)v3, (__m256)v7, 0x31));
  // Of a: lanes 0+4, 1+5, 2+6, 3+7 of v0, then of v4; now 0+2 and 1+3 of two vectors at once.
  __m256 ab = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
  __m256 cd = _mm256_add_ps(_mm256_shuffle_ps(c, d, 0x44), _mm256_shuffle_ps(c, d, 0xEE));
  return (f8)_mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x88), _mm256_shuffle_ps(ab, cd, 0xDD));
}
#else
INLINE f8 sums8(f8 v0, f8 v1, f8 v2, f8 v3, f8 v4, f8 v5, f8 v6, f8 v7) {
  return f8{sum8(v0), sum8(v1), sum8(v2), sum8(v3), sum8(v4), sum8(v5), sum8(v6), sum8(v7)};
}
#endif

INLINE float max8(f8 v) {
  float largest = v[0];
  for (int i = 1; i < 8; i++) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// ---- exp(x) for x <= 0; what is below -87 counts as -87
//
// Cephes' expf (Stephen L. Moshier): x = n ln 2 + f, a polynomial in f, times 2^n.
INLINE f8 exp8(f8 x) {
  f8 lowest = all8(-87.0f);
  x = x < lowest ? lowest : x;
  f8 shifted = fma(x, all8(1.44269504088896341f), all8(12582912.0f));  // n in the low bits
  i8 n = (i8)shifted - 0x4B400000;
  f8 whole = shifted - 12582912.0f;
  f8 f = fma(whole, all8(-0.693359375f), x);
  f = fma(whole, all8(2.12194440e-4f), f);
  f8 p = all8(1.9875691500e-4f);
  p = fma(p, f, all8(1.3981999507e-3f));
  p = fma(p, f, all8(8.3334519073e-3f));
  p = fma(p, f, all8(4.1665795894e-2f));
  p = fma(p, f, all8(1.6666665459e-1f));
  p = fma(p, f, all8(5.0000001201e-1f));
  p = fma(p * f, f, f) + 1.0f;
  return (f8)((i8)p + (n << 23));
}
