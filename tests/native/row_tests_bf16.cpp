#include "row_tests.h"

void test_rows_bf16(std::mt19937& rng) { assay::cuda::test_dtype<assay::cuda::bf16>(rng); }
