/* The tables that formats of 1 to 3 bits index (grids.c, written by scripts/make_grids.py).
 *
 * An entry stands for 8 neighbouring columns, 2 bits each, or for 4, 3 bits each (IQ3), the first
 * lowest: each number is a place among the format's magnitudes (codes.def). */
#ifndef SM_QUANTS_GRIDS_H
#define SM_QUANTS_GRIDS_H

#include <stdint.h>

extern const uint16_t sm_grid_iq1[2048];
extern const uint16_t sm_grid_iq2_xxs[256];
extern const uint16_t sm_grid_iq2_xs[512];
extern const uint16_t sm_grid_iq2_s[1024];
extern const uint16_t sm_grid_iq3_xxs[256];
extern const uint16_t sm_grid_iq3_s[512];

#endif
