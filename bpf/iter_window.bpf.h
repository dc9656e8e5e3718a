/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * What there may be more of than fits the side ring is read in a pass of its own, or in several,
 * each of which writes out a window of the records that it comes across.
 */

u64 window_first; /* first record of the window, counted over all objects of a pass */
u64 window_count; /* records that the pass came across */

static __always_inline bool in_window(void)
{
	return window_count++ - window_first < TRK_WINDOW;
}
