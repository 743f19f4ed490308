// Peaks of one core, one "name value" per line: multiply-adds as two operations, reads in bytes; both in 1e9 per second.
// Arguments: bytes of the L2 and L3 caches.
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { CHAINS = 12, TRIALS = 200 };  // independent sums: more than latency times ports
static const double TRIAL_SECONDS = 0.001;  // shorter than a time slice: the best of many trials had the core to itself
static const double MOST_SECONDS = 2;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

// The best of some trials of `work(rounds)`, which does `per_round` operations a round.
static void report(const char *name, void (*work)(long), double per_round) {
  long rounds = 1;
  double start = now(), begin, best = 0;
  for (; work(rounds), now() - start < TRIAL_SECONDS; rounds *= 2) start = now();
  begin = now();
  for (int trial = 0; trial < TRIALS && now() - begin < MOST_SECONDS; trial++) {
    start = now();
    work(rounds);
    double rate = rounds * per_round / (now() - start);
    if (rate > best) best = rate;
  }
  printf("%s %.1f\n", name, best / 1e9);
}

// CHAINS times `op` on a sum of its own, again and again; the empty asm keeps every sum in a register, and every product
// from being another's.
#define KERNEL(name, isa, type, zero, op)                                        \
  __attribute__((target(isa))) static void name(long rounds) {                   \
    type sum[CHAINS], a = zero, b = zero;                                        \
    __asm__ volatile("" : "+v"(a), "+v"(b));                                     \
    _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) sum[i] = zero;     \
    for (long n = 0; n < rounds; n++) {                                          \
      _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) {                \
        sum[i] = op;                                                             \
        __asm__ volatile("" : "+v"(sum[i]), "+v"(a));                            \
      }                                                                          \
    }                                                                            \
  }

KERNEL(fma256, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_fmadd_ps(a, b, sum[i]))
// Bytes without VNNI: products of two vectors are added in 16 bits, as far as that is exact, and then widened.
KERNEL(madd256, "avx2", __m256i, _mm256_setzero_si256(),
       _mm256_add_epi32(sum[i], _mm256_madd_epi16(_mm256_add_epi16(_mm256_maddubs_epi16(a, b),
                                                                   _mm256_maddubs_epi16(b, a)), b)))

static uint8_t *memory;
static size_t length;

__attribute__((target("avx2"))) static void read256(long rounds) {
  __m256i sum = _mm256_setzero_si256();
  for (long n = 0; n < rounds; n++)
    for (size_t i = 0; i < length; i += 128)
      for (int k = 0; k < 4; k++) sum = _mm256_or_si256(sum, *(const __m256i *)(memory + i + 32 * k));
  __asm__ volatile("" : "+x"(sum));
}

KERNEL(fma512, "avx512f", __m512, _mm512_setzero_ps(), _mm512_fmadd_ps(a, b, sum[i]))
KERNEL(vnni512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), _mm512_dpbusd_epi32(sum[i], a, b))

__attribute__((target("avx512f"))) static void read512(long rounds) {
  __m512i sum = _mm512_setzero_si512();
  for (long n = 0; n < rounds; n++)
    for (size_t i = 0; i < length; i += 256)
      for (int k = 0; k < 4; k++) sum = _mm512_or_si512(sum, *(const __m512i *)(memory + i + 64 * k));
  __asm__ volatile("" : "+v"(sum));
}

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#define HAS_NEW 0  // older compilers know neither AVX-VNNI nor AMX
#else
#define HAS_NEW 1
KERNEL(vnni256, "avxvnni,avx2", __m256i, _mm256_setzero_si256(), _mm256_dpbusd_avx_epi32(sum[i], a, b))

// Four tiles of sums from two and two of operands: as many as there are registers.
__attribute__((target("amx-tile,amx-int8"))) static void amx(long rounds) {
  struct __attribute__((packed)) {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } shape;
  memset(&shape, 0, sizeof shape);
  shape.palette = 1;
  for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
  __asm__ volatile("" : : "r"(&shape) : "memory");  // old headers do not say that the next line reads all of it
  _tile_loadconfig(&shape);
  for (long n = 0; n < rounds; n++) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}
#endif

static void bandwidth(const char *name, size_t bytes) {
  length = bytes / 256 * 256;
  memory = aligned_alloc(256, length);
  if (!memory) return;
  memset(memory, 1, length);
  report(name, __builtin_cpu_supports("avx512f") ? read512 : read256, length);
  free(memory);
}

// CPUID says what __builtin_cpu_supports does not know in every compiler.
static int cpuid7(int leaf, int reg, int bit) {
  unsigned r[4];
  __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(7), "c"(leaf));
  return r[reg] >> bit & 1;
}

int main(int count, char **arguments) {
  if (count != 3) return 1;
  size_t l2 = strtoull(arguments[1], 0, 10), l3 = strtoull(arguments[2], 0, 10);
  report("int8_madd_avx2", madd256, CHAINS * 64.0 * 2);
#if HAS_NEW
  if (cpuid7(1, 0, 4)) report("int8_vnni256", vnni256, CHAINS * 32.0 * 2);
#endif
  if (__builtin_cpu_supports("avx512vnni")) report("int8_vnni512", vnni512, CHAINS * 64.0 * 2);
#if HAS_NEW
  // 0x1023, 18: ARCH_REQ_XCOMP_PERM for tile data; Linux keeps the registers from who does not ask.
  if (cpuid7(0, 3, 25) && !syscall(SYS_arch_prctl, 0x1023, 18)) report("int8_amx", amx, 4 * 16.0 * 16 * 64 * 2);
#endif
  if (__builtin_cpu_supports("avx512f")) report("fp32_fma512", fma512, CHAINS * 16.0 * 2);
  report("fp32_fma256", fma256, CHAINS * 8.0 * 2);
  bandwidth("read_L2", l2 / 2);
  bandwidth("read_L3", l3 / 4 > 2 * l2 ? l3 / 4 : 2 * l2);
  bandwidth("read_memory", l3 * 2 > (512u << 20) ? l3 * 2 : 512u << 20);
  return 0;
}
