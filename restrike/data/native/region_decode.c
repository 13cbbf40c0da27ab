/* Decode one rectangle of a JPEG to RGB, with libjpeg-turbo's partial decoding.
 *
 * Entropy decoding of the rows above the rectangle cannot be avoided; inverse DCT, upsampling and colour conversion
 * outside it can, and nothing below it is read at all. Same settings as a full decode (accurate integer DCT, smooth
 * chroma upsampling), so that pixels are those of the full picture.
 *
 * Strict: a mere warning of libjpeg fails too, and the caller then decodes in full with a tolerant decoder.
 */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

/* Chroma upsampling looks one chroma sample (2 pixels at 4:2:0) beyond the pixel that it computes, and
 * treats the edge of the decoded part as the edge of the picture. */
#define MARGIN 2

typedef struct {
    struct jpeg_error_mgr base; /* first: libjpeg hands a pointer to it back */
    jmp_buf escape;
    char *message;
} error_guard;

static void escape(j_common_ptr jpeg) {
    error_guard *guard = (error_guard *)jpeg->err;
    guard->base.format_message(jpeg, guard->message);
    longjmp(guard->escape, 1);
}

static void escape_on_warning(j_common_ptr jpeg, int level) {
    if (level < 0) escape(jpeg);
}

/* Writes height x width x 3 bytes to `out`; on failure returns 1 with the reason in `message` (JMSG_LENGTH_MAX bytes).
 * The rectangle is in pixels of the picture after scaling by 1/denominator. */
int restrike_decode_region(const unsigned char *data, unsigned long size, int denominator, int top, int left,
                           int height, int width, unsigned char *out, char *message) {
    struct jpeg_decompress_struct jpeg;
    error_guard guard;
    memset(&jpeg, 0, sizeof jpeg);
    jpeg.err = jpeg_std_error(&guard.base);
    guard.base.error_exit = escape;
    guard.base.emit_message = escape_on_warning;
    guard.message = message;
    if (setjmp(guard.escape)) {
        jpeg_destroy_decompress(&jpeg);
        return 1;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, data, size);
    jpeg_read_header(&jpeg, TRUE);
    jpeg.out_color_space = JCS_RGB;
    jpeg.dct_method = JDCT_ISLOW;
    jpeg.do_fancy_upsampling = TRUE;
    jpeg.scale_num = 1;
    jpeg.scale_denom = denominator;
    jpeg_start_decompress(&jpeg);

    const int right = left + width, bottom = top + height, full_width = jpeg.output_width;
    if (top < 0 || left < 0 || height < 1 || width < 1 || right > full_width || bottom > (int)jpeg.output_height) {
        snprintf(message, JMSG_LENGTH_MAX, "rows %d-%d, columns %d-%d are not inside %u x %u pixels", top, bottom, left,
                 right, jpeg.output_height, jpeg.output_width);
        jpeg_destroy_decompress(&jpeg);
        return 1;
    }
    JDIMENSION start = left > MARGIN ? left - MARGIN : 0;
    JDIMENSION columns = (right + MARGIN < full_width ? right + MARGIN : full_width) - start;
    jpeg_crop_scanline(&jpeg, &start, &columns); /* moves start left to a whole block */
    if (top > MARGIN) jpeg_skip_scanlines(&jpeg, top - MARGIN);

    JSAMPARRAY row = jpeg.mem->alloc_sarray((j_common_ptr)&jpeg, JPOOL_IMAGE, columns * 3, 1);
    for (int y = jpeg.output_scanline; y < bottom; y++) {
        jpeg_read_scanlines(&jpeg, row, 1);
        if (y >= top) memcpy(out + (size_t)(y - top) * width * 3, row[0] + (size_t)(left - start) * 3, (size_t)width * 3);
    }
    jpeg_destroy_decompress(&jpeg);
    return 0;
}
