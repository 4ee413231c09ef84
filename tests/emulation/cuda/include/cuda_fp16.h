// The emulator in the place of the header of the CUDA toolkit.
#include "../emulator.h"
