# CPU backends and the flags of each, for the package's build and for the native tests.
set(CPU_BACKENDS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND CPU_BACKENDS avx2 avx512)
endif()
# Neither errno nor trapping exceptions are promised by any op, and both would keep selects from vectorising.
set(FLAGS_baseline -fno-math-errno -fno-trapping-math)
set(FLAGS_avx2 ${FLAGS_baseline} -mavx2 -mfma -mf16c -mbmi -mbmi2)
set(FLAGS_avx512 ${FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
# Assemblers before binutils 2.35 do not know the instructions of the matrix unit.
if("avx512" IN_LIST CPU_BACKENDS)
  include(CheckCXXSourceCompiles)
  check_cxx_source_compiles("int main() { asm volatile(\"tilezero %tmm0; tdpbf16ps %tmm0, %tmm1, %tmm2\"); }"
    UNLEARN_ASSEMBLES_AMX)
  if(NOT UNLEARN_ASSEMBLES_AMX)
    message(STATUS "unlearn_ext: the assembler of ${CMAKE_CXX_COMPILER} does not know AMX: built without the matrix unit's kernels")
    add_compile_definitions(UNLEARN_NO_MATRIX_UNIT)
  endif()
endif()
