// cpu.h -- CUDA's words as a C++ compiler knows them; include it before any kernel source.
#pragma once

#define __host__
#define __device__
#define __forceinline__ inline
