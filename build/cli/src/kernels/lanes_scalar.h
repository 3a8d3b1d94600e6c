// Sixteen float lanes, one after another: the definition of what lanes_avx2.h and lanes_avx512.h do at once.
// Included once by scalar.cpp, inside its namespace.

struct F32x16 {
  float v[16];
};

template <class F>
inline F32x16 each(F f) {
  F32x16 out;
  for (int i = 0; i < 16; i++) out.v[i] = f(i);
  return out;
}

inline F32x16 zero() { return F32x16{}; }
inline F32x16 set1(float a) {
  return each([&](int) { return a; });
}
inline F32x16 load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline F32x16 load_half(const uint16_t* p) {
  return each([&](int i) { return half_to_float(p[i]); });
}
// All lanes the half float at p, which need not be aligned.
inline F32x16 set1_half(const uint8_t* p) {
  uint16_t half;
  __builtin_memcpy(&half, p, sizeof half);
  return set1(half_to_float(half));
}
inline F32x16 load_bfloat(const uint16_t* p) {
  return each([&](int i) { return bfloat_to_float(p[i]); });
}
inline F32x16 load_int8(const int8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
inline F32x16 load_int32(const int32_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
inline void store(float* p, F32x16 a) {
  for (int i = 0; i < 16; i++) p[i] = a.v[i];
}
inline void store_half(uint16_t* p, F32x16 a) {
  for (int i = 0; i < 16; i++) p[i] = float_to_half(a.v[i]);
}
// Rounds to the nearest integer (ties to even); values lie within ±2³¹.
inline void store_int8(int8_t* p, F32x16 a) {
  for (int i = 0; i < 16; i++) {
    const float rounded = std::nearbyint(a.v[i]);
    p[i] = static_cast<int8_t>(rounded > 127.0f ? 127.0f : rounded >= -128.0f ? rounded : -128.0f);
  }
}
inline void store_int16(int16_t* p, F32x16 a) {
  for (int i = 0; i < 16; i++) {
    const float rounded = std::nearbyint(a.v[i]);
    p[i] = static_cast<int16_t>(rounded > 32767.0f ? 32767.0f : rounded >= -32768.0f ? rounded : -32768.0f);
  }
}
inline void store_uint8(uint8_t* p, F32x16 a) {  // whole numbers from 0 to 255
  for (int i = 0; i < 16; i++) p[i] = static_cast<uint8_t>(a.v[i]);
}
inline F32x16 add(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 div(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
// a > b ? a : b, as MAXPS does it (b where either is NaN).
inline F32x16 max(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 abs(F32x16 a) {
  return each([&](int i) { return std::fabs(a.v[i]); });
}
inline F32x16 rint(F32x16 a) {
  return each([&](int i) { return std::nearbyint(a.v[i]); });
}
// 2ⁿ for integral n in −126…127
inline F32x16 exp2_integral(F32x16 n) {
  return each([&](int i) { return std::bit_cast<float>((static_cast<int32_t>(n.v[i]) + 127) << 23); });
}
inline uint32_t not_below(F32x16 a, F32x16 b) {  // a bit for each lane
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) mask |= static_cast<uint32_t>(!(a.v[i] < b.v[i])) << i;
  return mask;
}
// Lanes at `count` and above become `fill`.
inline F32x16 keep_first(F32x16 a, size_t count, float fill) {
  return each([&](int i) { return static_cast<size_t>(i) < count ? a.v[i] : fill; });
}
template <class F>
inline float tree(F32x16 a, F f) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) a.v[i] = f(a.v[i], a.v[i + half]);
  return a.v[0];
}
inline float sum(F32x16 a) {
  return tree(a, [](float x, float y) { return x + y; });
}
inline float maximum(F32x16 a) {
  return tree(a, [](float x, float y) { return x > y ? x : y; });
}

struct F64x16 {
  double v[16];
};
inline F64x16 zero64() { return F64x16{}; }
inline F64x16 add(F64x16 a, F32x16 b) {
  for (int i = 0; i < 16; i++) a.v[i] += static_cast<double>(b.v[i]);
  return a;
}
inline double sum(F64x16 a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
  return a.v[0];
}

// Sixteen 32-bit integers, and sixteen pairs of 16-bit ones.
struct I32x16 {
  int32_t v[16];
};
struct I16Pairs {
  int16_t v[32];
};
inline I32x16 zero32() { return I32x16{}; }
inline I16Pairs load_pairs(const int8_t* p) {
  I16Pairs out;
  for (int i = 0; i < 32; i++) out.v[i] = p[i];
  return out;
}
inline I16Pairs set1_pair(const int16_t* p) {
  I16Pairs out;
  for (int i = 0; i < 32; i++) out.v[i] = p[i % 2];
  return out;
}
// sum + a₀ b₀ + a₁ b₁ of each pair
inline I32x16 add_products(I32x16 sum, I16Pairs a, I16Pairs b) {
  for (int i = 0; i < 16; i++) sum.v[i] += a.v[2 * i] * b.v[2 * i] + a.v[2 * i + 1] * b.v[2 * i + 1];
  return sum;
}
inline I32x16 add32(I32x16 a, const I32x16& b) {
  for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
  return a;
}
inline F32x16 to_float(I32x16 a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
