/* Elementary functions in scalar double, the same bits on every platform.  For tables, load-time
 * constants and sampling: not for kernels, which have their own float ones (kernels/). */
#ifndef SM_MATHX_H
#define SM_MATHX_H

/* All are accurate to better than 1e-14 relative (sin, cos: absolute, |x| <= 1e7). */
double sm_exp(double x);
double sm_log(double x); /* x > 0, finite */
double sm_pow(double x, double y); /* x > 0 */
void sm_sincos(double x, double *s, double *c);

#endif
