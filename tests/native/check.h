// What went wrong so far, in all files of a test program.
#pragma once
#include <cstdio>
#include <string>

inline int failures = 0;

inline void check(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}
