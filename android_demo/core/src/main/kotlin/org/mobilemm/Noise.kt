package org.mobilemm

/**
 * Noise from a seed: the rule by which every language draws the same picture.
 *
 * The bits are those of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a
 * counter-based generator: block i depends on the seed and on i alone. Two 32-bit words make two normal numbers by Box
 * and Muller, in double precision, then rounded to float32. `docs/noise.md` has the rule in full, with vectors.
 */
object Noise {
    /** The rule's name in a manifest. */
    const val RULE = "philox4x32-10-box-muller"

    /** More numbers than any generator needs, and fewer than a phone's memory holds. */
    const val MOST = 1L shl 26

    /** Independent numbers of mean 0 and variance 1, the same for the same seed; a longer shape goes on. */
    fun normal(
        seed: ULong,
        shape: List<Long>,
    ): Tensor {
        val tensor = Tensor.of("float32", *shape.toLongArray())
        val floats = tensor.floats()
        val words = IntArray(4)
        val numbers = FloatArray(4)
        for (block in 0 until (tensor.count + 3) / 4) {
            words[0] = block.toInt()
            words[1] = (block ushr 32).toInt()
            words[2] = 0
            words[3] = 0
            philox(words, seed.toInt(), (seed shr 32).toInt())
            pair(words, numbers, 0)
            pair(words, numbers, 2)
            floats.put(numbers, 0, minOf(4, floats.remaining()))
        }
        return tensor
    }

    /**
     * Two words → two numbers, at the same places. (0, 1] for the radius, so that its logarithm is finite; [0, 1) for
     * the angle. StrictMath gives the same bits on every JVM and on Android.
     */
    private fun pair(
        words: IntArray,
        numbers: FloatArray,
        at: Int,
    ) {
        val radius = StrictMath.sqrt(-2 * StrictMath.log((unsigned(words[at]) + 1) / WORDS))
        val angle = 2 * Math.PI * (unsigned(words[at + 1]) / WORDS)
        numbers[at] = (radius * StrictMath.cos(angle)).toFloat()
        numbers[at + 1] = (radius * StrictMath.sin(angle)).toFloat()
    }

    /** Philox4x32-10: the counter's four words, lowest first, become what they give. */
    internal fun philox(
        counter: IntArray,
        keyLow: Int,
        keyHigh: Int,
    ) {
        var low = keyLow
        var high = keyHigh
        repeat(ROUNDS) {
            val first = unsigned(counter[0]) * FIRST
            val second = unsigned(counter[2]) * SECOND
            counter[0] = (second ushr 32).toInt() xor counter[1] xor low
            counter[1] = second.toInt()
            counter[2] = (first ushr 32).toInt() xor counter[3] xor high
            counter[3] = first.toInt()
            low += WEYL_LOW
            high += WEYL_HIGH
        }
    }

    private fun unsigned(word: Int): Long = word.toLong() and 0xffffffffL

    private const val ROUNDS = 10
    private const val FIRST = 0xD2511F53L
    private const val SECOND = 0xCD9E8D57L
    private const val WEYL_LOW = 0x9E3779B9L.toInt()
    private const val WEYL_HIGH = 0xBB67AE85L.toInt()
    private const val WORDS = 4294967296.0
}
