package org.mobilemm

import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test

class NoiseTest {
    @Test fun `numbers are Python's, bit for bit`() {
        val cases = Vectors.objects("noise.json")
        assertTrue(cases.size >= 4)
        for (case in cases) {
            val found = Noise.normal(case.text("seed").toULong(), case.ints("shape").map { it.toLong() })
            val wanted = Vectors.floats(case.text("file"))
            val floats = FloatArray(wanted.size).also { found.floats().get(it) }
            assertEquals(case.ints("shape").map { it.toLong() }, found.shape)
            assertEquals(wanted.size.toLong(), found.count)
            assertArrayEquals("seed ${case["seed"]}", bits(wanted), bits(floats))
        }
    }

    private fun bits(floats: FloatArray) = IntArray(floats.size) { floats[it].toRawBits() }

    /** The vectors of docs/noise.md, and of the paper's own implementation for a counter of ones. */
    @Test fun `words are Philox's`() {
        val zeros = IntArray(4).also { Noise.philox(it, 0, 0) }
        assertEquals("6627e8d5 e169c58d bc57ac4c 9b00dbd8", zeros.joinToString(" ") { "%08x".format(it) })
        val ones = IntArray(4) { -1 }.also { Noise.philox(it, -1, -1) }
        assertEquals("408f276d 41c83b0e a20bc7c6 6d5451fd", ones.joinToString(" ") { "%08x".format(it) })
    }
}
