# CPU backends and the flags of each, for the package's build and for the native tests.
set(CPU_BACKENDS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND CPU_BACKENDS avx2 avx512)
endif()
# Neither errno nor trapping exceptions are promised by any op, and both would keep selects from vectorising.
set(FLAGS_baseline -fno-math-errno -fno-trapping-math)
set(FLAGS_avx2 ${FLAGS_baseline} -mavx2 -mfma -mf16c -mbmi -mbmi2)
set(FLAGS_avx512 ${FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
