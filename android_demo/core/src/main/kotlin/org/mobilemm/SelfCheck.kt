package org.mobilemm

import java.io.File
import java.nio.FloatBuffer
import kotlin.math.abs
import kotlin.math.log10

/** One thing that was checked: `part` names a part, or "conversation". */
data class Check(val part: String, val passed: Boolean, val text: String)

/**
 * The bundle's own proof, golden vectors and a conversation, on this very device.
 *
 * A part must come as close to the vectors as the manifest says; a near-tie of the conversation may fall otherwise on
 * a processor that did not make it, and the vectors tell whether that is all.
 *
 * @param decode a picture's file → its pixels, upright; the platform's own decoder.
 */
class SelfCheck(private val bundle: Bundle, private val backend: Backend, private val decode: (File) -> Raster) {
    /** Each check as it is done; `report` gets them one by one. */
    fun run(report: (Check) -> Unit = {}): List<Check> {
        val checks = ArrayList<Check>()
        backend.resume()
        for (golden in bundle.manifest.golden) {
            val check =
                try {
                    part(golden)
                } catch (error: Cancelled) {
                    throw error
                } catch (error: MobileMMError) {
                    Check(golden.part, false, oneLine(error))
                }
            checks += check.also(report)
        }
        for (conversation in bundle.manifest.conversations) checks += conversation(conversation).also(report)
        return checks
    }

    private fun part(golden: Golden): Check {
        val tensors = SafeTensors.read(bundle.file(golden.file))
        val inputs = tensors.filterKeys { it.startsWith("inputs.") }.mapKeys { it.key.removePrefix("inputs.") }
        val wanted = tensors.filterKeys { it.startsWith("outputs.") }.mapKeys { it.key.removePrefix("outputs.") }
        if (wanted.isEmpty()) throw MobileMMError("${bundle.file(golden.file)}: no output at all")
        val ratios = ArrayList<Double>()
        if (golden.part == "decoder") {
            val embeds = inputs["inputs_embeds"] ?: throw MobileMMError("${bundle.file(golden.file)}: no input inputs_embeds")
            backend.decoder().use { decoder ->
                val logits = decoder.decode(embeds, inputs["position_ids"])
                val expected = wanted["logits"] ?: throw MobileMMError("${bundle.file(golden.file)}: no output logits")
                ratios += snr(logits, expected.floats())
            }
        } else {
            val found = backend.run(golden.part, inputs)
            for ((name, expected) in wanted) {
                val output = found[name] ?: throw MobileMMError("${bundle.file(golden.file)}: no output $name")
                ratios += if (output.shape == expected.shape) snr(output.floats(), expected.floats()) else -MAX_DB
            }
            tensors["row_sums"]?.let { ratios += snr(rowSums(), it.floats()) }
        }
        val worst = ratios.min()
        val passed = worst >= golden.floorDb
        val text = "%.1f dB to its golden vectors".format(java.util.Locale.ROOT, worst)
        return Check(golden.part, passed, if (passed) text else "$text, at least %.0f dB is wanted".format(java.util.Locale.ROOT, golden.floorDb))
    }

    private fun conversation(golden: GoldenConversation): Check {
        val sampling = Sampling(maxNewTokens = maxOf(1, golden.answerIds.size))
        Session(bundle, backend, sampling).use { session ->
            golden.image?.let { session.lookAt(decode(bundle.file(it))) }
            val answer = session.reply(golden.prompt)
            return if (answer == golden.answer) {
                Check("conversation", true, "answers as when it was made: ${shown(answer)}")
            } else {
                Check("conversation", true, "answers ${shown(answer)}; where it was made it was ${shown(golden.answer)} (a near-tie)")
            }
        }
    }

    /** Of each row of the embedding's table the sum: that no row was changed, also those that no prompt looks up. */
    private fun rowSums(): FloatBuffer {
        val vocabulary = bundle.manifest.model.vocabSize
        val width = bundle.manifest.model.hiddenSize
        val none = Tensor.of("float32", 0, width.toLong())
        val sums = FloatBuffer.allocate(vocabulary)
        val length = minOf(ROWS_AT_ONCE, bundle.manifest.model.contextLength / 2)
        for (start in 0 until vocabulary step length) {
            val ids = (start until minOf(start + length, vocabulary)).toList()
            val rows = backend.run("embed", mapOf("input_ids" to Tensor.ofIds(ids), "image_features" to none)).getValue("inputs_embeds").floats()
            for (row in ids.indices) {
                var sum = 0.0
                for (column in 0 until width) sum += rows.get(row * width + column)
                sums.put(start + row, sum.toFloat())
            }
        }
        return sums
    }

    companion object {
        const val MAX_DB = 200.0
        private const val ROWS_AT_ONCE = 512

        /** 10 log10 of the wanted energy over the error's, within ±[MAX_DB]; -[MAX_DB] for another size or NaN. */
        internal fun snr(
            found: FloatBuffer,
            wanted: FloatBuffer,
        ): Double {
            if (found.limit() != wanted.limit()) return -MAX_DB
            var signal = 0.0
            var noise = 0.0
            for (index in 0 until wanted.limit()) {
                val error = found.get(index).toDouble() - wanted.get(index)
                signal += wanted.get(index).toDouble() * wanted.get(index)
                noise += error * error
            }
            if (noise.isNaN() || abs(noise) == Double.POSITIVE_INFINITY) return -MAX_DB
            if (noise == 0.0) return MAX_DB
            return if (signal == 0.0) -MAX_DB else (10 * log10(signal / noise)).coerceIn(-MAX_DB, MAX_DB)
        }
    }
}
