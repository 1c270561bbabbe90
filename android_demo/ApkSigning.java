import com.android.apksig.ApkSigner;
import com.android.apksig.ApkVerifier;
import java.io.File;
import java.io.FileInputStream;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.cert.X509Certificate;
import java.util.List;

/**
 * Signs an APK by schemes v2 and v3, whose alignment stays as it is, and verifies what was written.
 *
 * <p>java -cp apksig.jar ApkSigning.java UNSIGNED SIGNED KEYSTORE PASSWORD ALIAS MIN_SDK
 */
public class ApkSigning {
    public static void main(String[] arguments) throws Exception {
        File signed = new File(arguments[1]);
        char[] password = arguments[3].toCharArray();
        int minSdk = Integer.parseInt(arguments[5]);
        KeyStore keys = KeyStore.getInstance("PKCS12");
        try (FileInputStream stream = new FileInputStream(arguments[2])) {
            keys.load(stream, password);
        }
        PrivateKey key = (PrivateKey) keys.getKey(arguments[4], password);
        X509Certificate certificate = (X509Certificate) keys.getCertificate(arguments[4]);
        ApkSigner.SignerConfig signer =
                new ApkSigner.SignerConfig.Builder("mobilemm", key, List.of(certificate)).build();
        new ApkSigner.Builder(List.of(signer))
                .setInputApk(new File(arguments[0]))
                .setOutputApk(signed)
                .setMinSdkVersion(minSdk)
                .setV1SigningEnabled(false)
                .setV2SigningEnabled(true)
                .setV3SigningEnabled(true)
                .setAlignmentPreserved(true)
                .build()
                .sign();
        ApkVerifier.Result result = new ApkVerifier.Builder(signed).setMinCheckedPlatformVersion(minSdk).build().verify();
        System.out.println(
                "verified " + result.isVerified()
                        + ", v2 " + result.isVerifiedUsingV2Scheme()
                        + ", v3 " + result.isVerifiedUsingV3Scheme());
        result.getErrors().forEach(System.err::println);
        if (!result.isVerified() || !result.isVerifiedUsingV2Scheme() || !result.isVerifiedUsingV3Scheme()) {
            System.exit(1);
        }
    }
}
