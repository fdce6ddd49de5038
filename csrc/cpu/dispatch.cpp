// Which instruction set runs: the best that this build holds and this processor has.
#include <cstring>

#include "../assay.h"

namespace assay {

#define ASSAY_DECLARE(isa)   \
  namespace isa {            \
  extern const Kernels kernels; \
  }
ASSAY_DECLARE(scalar)
#ifdef ASSAY_HAS_avx2
ASSAY_DECLARE(avx2)
#endif
#ifdef ASSAY_HAS_avx512
ASSAY_DECLARE(avx512)
#endif
#ifdef ASSAY_HAS_avx512_bf16
ASSAY_DECLARE(avx512_bf16)
#endif
#undef ASSAY_DECLARE

// Each test names exactly the features that its unit is compiled with (CMakeLists.txt), no fewer and no more.
int isa_list(Isa out[4]) {
  int n = 0;
  out[n++] = {&scalar::kernels, true};
#if defined(ASSAY_HAS_avx2) || defined(ASSAY_HAS_avx512) || defined(ASSAY_HAS_avx512_bf16)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef ASSAY_HAS_avx2
  out[n++] = {&avx2::kernels, avx2};
#endif
#ifdef ASSAY_HAS_avx512
  out[n++] = {&avx512::kernels, avx512};
#endif
#ifdef ASSAY_HAS_avx512_bf16
  out[n++] = {&avx512_bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16")};
#endif
  return n;
}

const Kernels* select_kernels(const char* name) {
  Isa list[4];
  const int n = isa_list(list);
  for (int i = n; i-- > 0;) {
    if (!list[i].supported) continue;
    if (name == nullptr || std::strcmp(name, list[i].kernels->isa) == 0) return list[i].kernels;
  }
  return nullptr;
}

}  // namespace assay
