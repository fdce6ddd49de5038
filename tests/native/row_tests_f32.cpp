#include "row_tests.h"

void test_rows_f32(std::mt19937& rng) { assay::cuda::test_dtype<float>(rng); }
