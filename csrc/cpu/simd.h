// Vector width chosen at run time, and 16-bit floats in code that compilers vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// One clone a vector width, picked by the loader: wheels run on any x86-64 and still use the widest registers. A build
// with -DFBKD_CLONES= has the width of its -march alone.
#if defined(FBKD_CLONES)
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FBKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FBKD_HAS_CLONES
#else
#define FBKD_CLONES
#endif

// Bodies have to end up inside the clones: a call would go to code for the default width.
#define FBKD_INLINE inline __attribute__((always_inline))

namespace fbkd {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Element types of this device, for dispatch.
struct Cpu {
  using Half = fbkd::Half;
  using BFloat16 = fbkd::BFloat16;
};

FBKD_INLINE float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FBKD_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FBKD_INLINE float load(float x) { return x; }
FBKD_INLINE double load(double x) { return x; }
FBKD_INLINE float load(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

FBKD_INLINE float load(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  // Exponents 1..30 are rebiased by 127 - 15; 31 (Inf, NaN) by twice that; 0 (subnormal) through a subtraction.
  const uint32_t rebias = 112u << 23;
  const uint32_t normal = magnitude + rebias + (magnitude >= (31u << 23) ? rebias : 0u);
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude + (113u << 23)) - float_of_bits(113u << 23));
  return float_of_bits(sign | (magnitude < (1u << 23) ? subnormal : normal));
}

FBKD_INLINE void store(float& to, float value) { to = value; }
FBKD_INLINE void store(double& to, double value) { to = value; }

// Round to nearest even, NaN stays NaN.
FBKD_INLINE void store(BFloat16& to, float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

FBKD_INLINE void store(Half& to, float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14: adding 0.5 leaves the half's subnormal mantissa, rounded to nearest even, in the low bits.
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  // 65520 and above round to Inf.
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  to.bits = static_cast<uint16_t>((magnitude >= 0x477ff000u ? large : finite) | ((bits >> 16) & 0x8000u));
}

// e^x for x <= 0 within 2 units in the last place, 0 where the result would be subnormal, NaN of NaN. The standard
// function does not vectorise.
FBKD_INLINE float exponential(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kSmallest = -87.3f;  // of the arguments with a normal result
  const float clipped = x < kSmallest ? kSmallest : x;
  const float shifted = clipped * kLog2E + 12582912.0f;  // 1.5 * 2^23: its low bits are the nearest integer
  const float power = shifted - 12582912.0f;
  const float r = (clipped - power * kLn2High) - power * kLn2Low;  // |r| <= ln(2) / 2
  float tail = 1.0f / 5040;
  tail = tail * r + 1.0f / 720;
  tail = tail * r + 1.0f / 120;
  tail = tail * r + 1.0f / 24;
  tail = tail * r + 1.0f / 6;
  tail = tail * r + 0.5f;
  const float fraction = (tail * r * r + r) + 1.0f;
  const float scale = float_of_bits((bits_of_float(shifted) + 127u) << 23);
  const float value = fraction * scale;
  return x < kSmallest ? 0.0f : value;
}

FBKD_INLINE double exponential(double x) { return std::exp(x); }

}  // namespace fbkd
