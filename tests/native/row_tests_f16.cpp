#include "row_tests.h"

void test_rows_f16(std::mt19937& rng) { assay::cuda::test_dtype<assay::cuda::f16>(rng); }
