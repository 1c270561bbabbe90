package org.mobilemm

/** From the bytes of a `manifest.json`, which may come from anyone, to a [Manifest] that holds together. */
object ManifestReader {
    const val SCHEMA_VERSION = 1L
    const val LARGEST = 16 * 1024 * 1024
    const val AGAIN = "export the bundle or pull it again"

    /**
     * The manifest in these bytes of the file `path`, checked for types, ranges, paths and agreement.
     *
     * Raises [MobileMMError], one line that names the file, the key, what is wrong, and the way out.
     */
    fun parse(
        data: ByteArray,
        path: String,
    ): Manifest {
        if (data.size > LARGEST) throw MobileMMError("$path: larger than ${LARGEST shr 20} MB; $AGAIN")
        val value =
            try {
                Json.parse(data)
            } catch (error: JsonError) {
                throw MobileMMError("$path: ${error.message}; $AGAIN", error)
            }
        if (value !is Map<*, *>) throw MobileMMError("$path: must hold a JSON object, not ${shown(value)}; $AGAIN")
        val version = value["schema_version"]
        if (version is Long && version != SCHEMA_VERSION) {
            val wayOut = if (version > SCHEMA_VERSION) "newer than this app reads ($SCHEMA_VERSION); update it" else "too old; export the model again"
            throw MobileMMError("$path: key 'schema_version': format version ${shown(version)} is $wayOut")
        }
        try {
            @Suppress("UNCHECKED_CAST")
            val manifest = manifest(Fields(value as Map<String, Any?>, ""))
            checkAgreement(manifest)
            return manifest
        } catch (fault: KeyFault) {
            throw MobileMMError("$path: key ${shown(fault.key, 100)}: ${fault.wrong}; $AGAIN", fault)
        }
    }
}

/** What is wrong with one key. */
internal class KeyFault(val key: String, val wrong: String) : Exception("$key: $wrong")

private const val SEGMENT = "[A-Za-z0-9_](?:[A-Za-z0-9._+-]*[A-Za-z0-9_+-])?"

// Possessive, because a stranger's path of many segments must not make the match run for minutes.
private val PATH = Regex("$SEGMENT(?:/$SEGMENT)*+")
private val SHA256 = Regex("[0-9a-f]{64}")
private const val SIZE = 1L shl 20
private val DTYPES = setOf("float32", "float16", "uint8", "int8", "int32", "int64")

/** One JSON object, of which every key must be taken, and none is left. */
private class Fields(private val map: Map<String, Any?>, private val at: String) {
    private val taken = HashSet<String>()

    fun key(name: String) = if (at.isEmpty()) name else "$at.$name"

    fun has(name: String) = map.containsKey(name)

    fun raw(name: String): Any? {
        taken += name
        if (!map.containsKey(name)) throw KeyFault(key(name), "is missing")
        return map[name]
    }

    fun end() {
        for (name in map.keys) if (name !in taken) throw KeyFault(key(name), "is not known in this format version")
    }

    fun string(
        name: String,
        least: Int = 0,
        most: Int = 1 shl 16,
    ) = stringOf(raw(name), key(name), least, most)

    fun name(name: String) = string(name, 1, 200)

    fun nullableString(name: String): String? = if (!has(name) || map[name] == null) null.also { taken += name } else string(name)

    fun oneOf(
        name: String,
        known: Set<String>,
    ): String {
        val value = string(name)
        if (value !in known) throw KeyFault(key(name), "must be ${known.joinToString(" or ")}, not ${shown(value)}")
        return value
    }

    fun int(
        name: String,
        least: Long,
        most: Long,
    ) = intOf(raw(name), key(name), least, most)

    fun size(name: String) = int(name, 1, SIZE).toInt()

    fun token(name: String) = int(name, 0, Int.MAX_VALUE.toLong()).toInt()

    fun double(name: String): Double =
        when (val value = raw(name)) {
            is Double -> value
            is Long -> value.toDouble()
            else -> throw KeyFault(key(name), "must be a number, not ${shown(value)}")
        }

    fun nullableDouble(name: String): Double? = if (!has(name) || map[name] == null) null.also { taken += name } else double(name)

    fun nullableDoubles(name: String): List<Double>? =
        if (!has(name) || map[name] == null) {
            null.also { taken += name }
        } else {
            list(name) { value, at ->
                (value as? Number)?.toDouble() ?: throw KeyFault(at, "must be a number, not ${shown(value)}")
            }
        }

    fun boolean(
        name: String,
        default: Boolean,
    ): Boolean {
        if (!has(name)) return default
        return raw(name) as? Boolean ?: throw KeyFault(key(name), "must be true or false, not ${shown(map[name])}")
    }

    fun path(name: String) = pathOf(raw(name), key(name))

    @Suppress("UNCHECKED_CAST")
    fun map(name: String): Map<String, Any?> =
        raw(name) as? Map<String, Any?> ?: throw KeyFault(key(name), "must be an object, not ${shown(map[name])}")

    fun fields(name: String) = Fields(map(name), key(name))

    fun nullableFields(name: String): Fields? = if (raw(name) == null) null else fields(name)

    fun optionalFields(name: String): Fields? = if (has(name)) nullableFields(name) else null

    fun <T> list(
        name: String,
        least: Int = 0,
        most: Int = Int.MAX_VALUE,
        each: (Any?, String) -> T,
    ): List<T> {
        return listOf(raw(name), key(name), least, most, each)
    }

    fun tokens(name: String) = list(name) { value, at -> intOf(value, at, 0, Int.MAX_VALUE.toLong()).toInt() }
}

/** Whether it leads nowhere but to a file inside of a bundle. */
internal fun isPlainPath(path: String) = path.length <= 200 && PATH.matches(path)

private fun stringOf(
    value: Any?,
    key: String,
    least: Int,
    most: Int,
): String {
    if (value !is String) throw KeyFault(key, "must be a string, not ${shown(value)}")
    val length = value.codePointCount(0, value.length)
    if (length !in least..most) throw KeyFault(key, "has $length characters, where $least to $most are expected")
    return value
}

private fun <T> listOf(
    value: Any?,
    key: String,
    least: Int,
    most: Int,
    each: (Any?, String) -> T,
): List<T> {
    val values = value as? List<*> ?: throw KeyFault(key, "must be an array, not ${shown(value)}")
    if (values.size !in least..most) throw KeyFault(key, "has ${values.size} elements, where $least to $most are expected")
    return values.mapIndexed { index, one -> each(one, "$key.$index") }
}

private fun scaleOf(
    value: Any?,
    key: String,
): Float {
    if (value !is Double && value !is Long) throw KeyFault(key, "must be a number, not ${shown(value)}")
    val number = (value as Number).toDouble()
    if (Math.abs(number) > LARGEST_SCALE) throw KeyFault(key, "must be from -1e9 to 1e9, not $number")
    return number.toFloat()
}

private const val LARGEST_SCALE = 1e9
private const val MOST_STEPS = 50

private fun intOf(
    value: Any?,
    key: String,
    least: Long,
    most: Long,
): Long {
    if (value !is Long) throw KeyFault(key, "must be a whole number, not ${shown(value)}")
    if (value !in least..most) throw KeyFault(key, "must be from $least to $most, not ${shown(value)}")
    return value
}

private fun pathOf(
    value: Any?,
    key: String,
): String {
    val path = stringOf(value, key, 1, 200)
    if (!PATH.matches(path)) {
        throw KeyFault(key, "${shown(path)} is no plain path inside the bundle (letters, digits and . _ + - / only)")
    }
    return path
}

@Suppress("UNCHECKED_CAST")
private fun fieldsOf(
    value: Any?,
    key: String,
) = Fields(value as? Map<String, Any?> ?: throw KeyFault(key, "must be an object, not ${shown(value)}"), key)

@Suppress("UNCHECKED_CAST")
private fun mapOf(
    value: Any?,
    key: String,
) = value as? Map<String, Any?> ?: throw KeyFault(key, "must be an object, not ${shown(value)}")

private fun manifest(of: Fields): Manifest {
    of.int("schema_version", 1, 1)
    val runtime = of.fields("runtime")
    val found =
        Manifest(
            createdBy = of.map("created_by").mapValues { (name, value) -> stringOf(value, "created_by.$name", 0, Int.MAX_VALUE) },
            target = of.oneOf("target", setOf("onnx", "coreml", "executorch")),
            runtimeName = runtime.name("name"),
            runtimeMinVersion = runtime.name("min_version"),
            model = model(of.fields("model")),
            parts =
                of.map("parts").mapValues { (name, value) ->
                    stringOf(name, "parts", 1, 200)
                    part(fieldsOf(value, "parts.$name"))
                },
            image = of.nullableFields("image")?.let(::image),
            prompt = prompt(of.fields("prompt")),
            generation = of.optionalFields("generation")?.let(::generation),
            golden = of.list("golden") { value, key -> golden(fieldsOf(value, key)) },
            conversations = of.list("conversations") { value, key -> conversation(fieldsOf(value, key)) },
            benchmarks = if (of.has("benchmarks")) of.list("benchmarks") { value, key -> mapOf(value, key) } else emptyList(),
            files = of.list("files", 1, 10_000) { value, key -> file(fieldsOf(value, key)) },
        )
    runtime.end()
    of.end()
    return found
}

private fun model(of: Fields) =
    ModelCard(
        name = of.name("name"),
        family = of.name("family"),
        license = if (of.has("license")) of.string("license") else "",
        contextLength = of.size("context_length"),
        hiddenSize = of.size("hidden_size"),
        vocabSize = of.size("vocab_size"),
        numLayers = of.size("num_layers"),
        numAttentionHeads = of.size("num_attention_heads"),
        numKeyValueHeads = of.size("num_key_value_heads"),
        headDim = of.size("head_dim"),
        numImageTokens = of.int("num_image_tokens", 0, SIZE).toInt(),
        imageTokenId = of.token("image_token_id"),
        bosTokenId = if (of.raw("bos_token_id") == null) null else of.token("bos_token_id"),
        eosTokenIds = of.tokens("eos_token_ids"),
        padTokenId = of.token("pad_token_id"),
    ).also { of.end() }

private fun part(of: Fields) =
    Part(
        file = of.path("file"),
        files = of.list("files", 1, each = ::pathOf),
        inputs = of.list("inputs", 1) { value, key -> tensor(fieldsOf(value, key)) },
        outputs = of.list("outputs", 1) { value, key -> tensor(fieldsOf(value, key)) },
        quantization = quantization(of.fields("quantization")),
        bytes = of.int("bytes", 1, (1L shl 50) - 1),
        parameters = of.int("parameters", 0, (1L shl 50) - 1),
        peakMemory = of.int("peak_memory", 0, (1L shl 50) - 1),
        fingerprint = sha256(of, "fingerprint"),
        parity = of.optionalFields("parity")?.let(::parity),
        cache = if (of.has("cache") && of.raw("cache") != null) of.oneOf("cache", setOf("shared", "concatenated")) else null,
    ).also { of.end() }

private fun tensor(of: Fields) =
    TensorSpec(
        name = of.name("name"),
        dtype = of.oneOf("dtype", DTYPES),
        shape =
            of.list("shape") { value, key ->
                if (value is Long) intOf(value, key, 0, 1L shl 31) else stringOf(value, key, 1, 200)
            },
    ).also { of.end() }

private fun quantization(of: Fields) =
    Quantization(
        bits =
            of.int("bits", 4, 32).toInt().also {
                if (it !in setOf(4, 6, 8, 16, 32)) throw KeyFault(of.key("bits"), "must be 4, 6, 8, 16 or 32, not $it")
            },
        blockSize = if (of.has("block_size") && of.raw("block_size") != null) of.size("block_size") else null,
        symmetric = of.boolean("symmetric", true),
        method = if (of.has("method")) of.name("method") else "none",
        activations =
            if (of.has("activations")) {
                of.oneOf("activations", setOf("float32", "float16", "int8", "int8-static"))
            } else {
                "float32"
            },
        exceptions =
            if (of.has("exceptions")) {
                of.map("exceptions").mapValues { (name, value) ->
                    intOf(value, of.key("exceptions.$name"), Long.MIN_VALUE, Long.MAX_VALUE)
                }
            } else {
                emptyMap()
            },
    ).also { of.end() }

private fun parity(of: Fields) =
    Parity(
        cosine = of.double("cosine"),
        snrDb = of.double("snr_db"),
        maxAbsError = of.double("max_abs_error"),
        conversionDb = of.double("conversion_db"),
        top1 = of.nullableDouble("top1"),
        nearTies = of.nullableDouble("near_ties"),
        kl = of.nullableDouble("kl"),
        layers = of.nullableDoubles("layers"),
    ).also { of.end() }

private fun image(of: Fields) =
    ImageRule(
        height = of.size("height"),
        width = of.size("width"),
        strategy = of.oneOf("strategy", setOf("stretch", "pad", "crop")),
        filter = of.oneOf("filter", setOf("nearest", "bilinear", "bicubic", "lanczos")),
        padColor =
            if (of.has("pad_color")) {
                of.list("pad_color", 3, 3) { value, key -> intOf(value, key, 0, 255).toInt() }
            } else {
                listOf(0, 0, 0)
            },
        shortestEdge = if (of.has("shortest_edge") && of.raw("shortest_edge") != null) of.size("shortest_edge") else null,
        positionGrid =
            if (of.has("position_grid") && of.raw("position_grid") != null) {
                of.list("position_grid", 2, 2) { value, key -> intOf(value, key, 1, SIZE).toInt() }
            } else {
                null
            },
    ).also { of.end() }

private fun prompt(of: Fields) =
    Prompt(
        tokenizer = if (of.has("tokenizer")) of.path("tokenizer") else "tokenizer.json",
        begin = of.string("begin"),
        system = of.nullableFields("system")?.let(::turn),
        user = turn(of.fields("user")),
        assistant = turn(of.fields("assistant")),
        generation = of.string("generation"),
        laterUser = of.optionalFields("later_user")?.let(::turn),
        userAfterSystem = of.optionalFields("user_after_system")?.let(::turn),
        imagePrefix = if (of.has("image_prefix")) of.string("image_prefix") else "",
        imageSuffix = if (of.has("image_suffix")) of.string("image_suffix") else "",
        strip = if (of.has("strip")) of.oneOf("strip", setOf("none", "text", "content")) else "none",
        addBos = of.boolean("add_bos", false),
        stop = if (of.has("stop")) of.list("stop") { value, key -> stringOf(value, key, 0, 1 shl 16) } else emptyList(),
        examples = if (of.has("examples")) of.list("examples") { value, key -> example(fieldsOf(value, key)) } else emptyList(),
    ).also { of.end() }

private fun turn(of: Fields) =
    Turn(
        prefix = of.string("prefix"),
        suffix = of.string("suffix"),
        prefixBeforeImage = of.nullableString("prefix_before_image"),
        text = of.boolean("text", true),
    ).also { of.end() }

private fun example(of: Fields) =
    RenderedExample(
        messages = of.list("messages", each = ::mapOf),
        rendered = of.string("rendered"),
        inputIds = of.tokens("input_ids"),
    ).also { of.end() }

private fun generation(of: Fields): Generation {
    val noise = of.fields("noise")
    noise.oneOf("rule", setOf(Noise.RULE))
    val found =
        Generation(
            signalTokenIds = of.list("signal_token_ids", 1, 64) { value, key -> intOf(value, key, 0, Int.MAX_VALUE.toLong()).toInt() },
            height = of.size("height"),
            width = of.size("width"),
            steps = of.size("steps"),
            noiseShape = noise.list("shape", 1, 8) { value, key -> intOf(value, key, 1, SIZE) },
            schedules = if (of.has("schedules") && of.raw("schedules") != null) of.list("schedules", 1, MOST_STEPS, ::schedule) else null,
        )
    noise.end()
    of.end()
    return found
}

private fun schedule(
    value: Any?,
    key: String,
) = listOf(value, key, 1, MOST_STEPS) { row, place -> listOf(row, place, 5, 5, ::scaleOf).toFloatArray() }

private fun golden(of: Fields) =
    Golden(file = of.path("file"), part = of.name("part"), floorDb = of.double("floor_db")).also { of.end() }

private fun conversation(of: Fields) =
    GoldenConversation(
        image = if (of.raw("image") == null) null else of.path("image"),
        prompt = of.string("prompt"),
        inputIds = of.tokens("input_ids"),
        answerIds = of.tokens("answer_ids"),
        answer = of.string("answer"),
        pytorchAnswer = of.nullableString("pytorch_answer"),
    ).also { of.end() }

private fun file(of: Fields) =
    BundleFile(path = of.path("path"), bytes = of.int("bytes", 0, (1L shl 40) - 1), sha256 = sha256(of, "sha256")).also { of.end() }

private fun sha256(
    of: Fields,
    name: String,
): String {
    val value = of.string(name)
    if (!SHA256.matches(value)) throw KeyFault(of.key(name), "must be 64 hexadecimal digits, not ${shown(value)}")
    return value
}
