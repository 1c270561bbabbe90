package org.mobilemm

import java.nio.FloatBuffer
import java.security.SecureRandom
import java.util.Arrays
import kotlin.math.exp

/**
 * How the next token is chosen. Temperature 0 is greedy, and then only the repetition penalty matters.
 *
 * @property maxNewTokens the longest answer.
 * @property temperature what logits are divided by; 0 for greedy.
 * @property topK only the k likeliest tokens, and those as likely as the last of them; 0 for all.
 * @property topP only the fewest likeliest tokens whose probabilities sum to more than this.
 * @property repetitionPenalty what the logits of tokens that were already there are divided (negative ones:
 *   multiplied) by, the prompt's included.
 * @property seed makes the draw repeatable, anew with each answer; null for a different one each time.
 * @property minP only tokens at least this many times as likely as the likeliest.
 */
data class Sampling(
    val maxNewTokens: Int = 256,
    val temperature: Double = 0.0,
    val topK: Int = 0,
    val topP: Double = 1.0,
    val repetitionPenalty: Double = 1.0,
    val seed: Long? = null,
    val minP: Double = 0.0,
)

/**
 * Chooses one token after another by the same settings.
 *
 * The order is that of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p; each filter
 * sees the probabilities that the one before it left, made to sum to 1 again.
 */
class Sampler(private val sampling: Sampling) {
    private val random = SplitMix64(sampling.seed ?: SecureRandom().nextLong())
    private var scores = FloatArray(0)

    /** The token's id, for the first `size` of the logits and the ids of the prompt and of the answer so far. */
    fun choose(
        logits: FloatBuffer,
        size: Int,
        seen: List<Int>,
    ): Int {
        if (sampling.temperature <= 0 && sampling.repetitionPenalty == 1.0) return largest(size, logits::get)
        if (scores.size != size) scores = FloatArray(size)
        for (id in 0 until size) scores[id] = logits.get(id)
        if (sampling.repetitionPenalty != 1.0) penalize(scores, seen)
        if (sampling.temperature <= 0) return largest(size, scores::get)
        return draw()
    }

    /** Source: Keskar et al. 2019, arXiv 1909.05858, section 4.1. Ids beyond the vocabulary are left out. */
    private fun penalize(
        scores: FloatArray,
        seen: List<Int>,
    ) {
        val penalty = sampling.repetitionPenalty.toFloat()
        for (id in seen.toHashSet()) {
            if (id < scores.size) scores[id] = if (scores[id] < 0) scores[id] * penalty else scores[id] / penalty
        }
    }

    private fun draw(): Int {
        val temperature = sampling.temperature.toFloat()
        for (id in scores.indices) scores[id] /= temperature
        var ids = IntArray(scores.size) { it }
        if (sampling.topK in 1 until scores.size) {
            val least = scores.copyOf().also(Arrays::sort)[scores.size - sampling.topK]
            ids = ids.filter { scores[it] >= least }.toIntArray()
        }
        if (sampling.topP < 1) ids = nucleus(ids)
        var shares = softmax(ids)
        if (sampling.minP > 0) {
            val floor = minOf(sampling.minP, 1.0) * shares.max()
            ids = ids.filterIndexed { index, _ -> shares[index] >= floor }.toIntArray()
            shares = softmax(ids)
        }
        var total = 0.0
        val sums = DoubleArray(shares.size) { total += shares[it]; total }
        val point = random.uniform() * total
        val index = sums.indexOfFirst { it > point }
        return ids[if (index < 0) ids.lastIndex else index]
    }

    private fun nucleus(ids: IntArray): IntArray {
        val shares = softmax(ids)
        // Tokens below the mean share of what is cut off all go: only the others need to be sorted.
        val least = (1 - sampling.topP) / ids.size
        val likeliest = shares.indices.maxByOrNull { shares[it] }!!
        val some = shares.indices.filter { shares[it] >= least || it == likeliest }.sortedBy { shares[it] }
        var total = shares.indices.filter { shares[it] < least && it != likeliest }.sumOf { shares[it] }
        val stays = ArrayList<Int>()
        for ((place, index) in some.withIndex()) {
            total += shares[index]
            if (total > 1 - sampling.topP || place == some.lastIndex) stays += ids[index]
        }
        return stays.toIntArray().also(Arrays::sort)
    }

    private fun softmax(ids: IntArray): DoubleArray {
        val most = ids.maxOf { scores[it] }.toDouble()
        val powers = DoubleArray(ids.size) { exp(scores[ids[it]] - most) }
        val sum = powers.sum()
        for (index in powers.indices) powers[index] /= sum
        return powers
    }

    companion object {
        /** The first of the largest. */
        internal inline fun largest(
            size: Int,
            at: (Int) -> Float,
        ): Int {
            var best = 0
            var most = at(0)
            for (id in 1 until size) {
                val value = at(id)
                if (value > most) {
                    most = value
                    best = id
                }
            }
            return best
        }
    }
}

/** Random numbers by ten lines in any language. Source: Steele, Lea and Flood 2014, "Fast splittable PRNGs". */
class SplitMix64(private var state: Long) {
    fun next(): Long {
        state += -0x61c8864680b583ebL
        var mixed = state
        mixed = (mixed xor (mixed ushr 30)) * -0x40a7b892e31b1a47L
        mixed = (mixed xor (mixed ushr 27)) * -0x6b2fb644ecceee15L
        return mixed xor (mixed ushr 31)
    }

    /** A number from 0 to 1, without 1: the upper 53 bits. */
    fun uniform(): Double = (next() ushr 11) * (1.0 / (1L shl 53))
}
