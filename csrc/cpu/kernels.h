// The kernels of the instruction set being compiled. ASSAY_ISA is its name and its namespace, so that units built with
// different flags never share a symbol: the linker could keep the AVX-512 copy and crash an older processor.
#pragma once
#include "../assay.h"

namespace assay::ASSAY_ISA {
bool count_ngrams(const Texts&, const CountArgs&);
void count_tokens(const Texts&, int64_t*);
void ensemble(const EnsembleArgs&);
void hash_ngrams(const Texts&, const HashArgs&);
void least_hashes(const LeastArgs&);
void linear(const LinearArgs&);
void multiply_reduce(const MultiplyReduceArgs&);
void philox(const PhiloxArgs&);
void project(const ProjectArgs&);
void residual(const ResidualArgs&);
void scan(const ScanArgs&);
void weighted_sums(const SumsArgs&);
}  // namespace assay::ASSAY_ISA
