// Searches by JDBC: java -cp postgresql.jar Searches.java PORT KEY PASSWORD TOKEN. It prints a line each.
// TOKEN is of a transaction that does not end: a search after it waits until it is cancelled.
import java.sql.*;
import java.util.*;

public class Searches {
    static List<String> keys(PreparedStatement statement) throws SQLException {
        List<String> keys = new ArrayList<>();
        try (ResultSet rows = statement.executeQuery()) {
            while (rows.next()) keys.add(rows.getString("key"));
        }
        return keys;
    }

    static String state(Statement statement, String text) {
        try {
            statement.execute(text);
            return "ok";
        } catch (SQLException error) {
            return error.getSQLState();
        }
    }

    public static void main(String[] given) throws Exception {
        String url = "jdbc:postgresql://127.0.0.1:" + given[0] + "/any?user=any&prepareThreshold=2";
        Properties with = new Properties();
        with.setProperty("password", given[2]);
        try (Connection connection = DriverManager.getConnection(url, with)) {
            List<String> found = null;
            try (PreparedStatement near = connection.prepareStatement(
                    "SELECT key, distance FROM search_key(?, ?, k => ?)")) {
                for (int time = 0; time < 6; time++) {  // from the second on prepared, in binary
                    near.setString(1, "chunks");
                    near.setString(2, given[1]);
                    near.setInt(3, 4);
                    found = keys(near);
                }
            }
            System.out.println("keys " + String.join(",", found));
            connection.setAutoCommit(false);
            try (PreparedStatement paged = connection.prepareStatement(
                    "SELECT key, distance FROM search('chunks', ?, k => 25, recall => ?)")) {
                paged.setString(1, "[1, 0, 0]");
                paged.setFloat(2, 1f);
                paged.setFetchSize(10);  // a portal that is read in three parts
                System.out.println("paged " + keys(paged).size());
            }
            try (Statement statement = connection.createStatement()) {
                System.out.println("unknown " + state(statement, "SELECT * FROM search('nope', '[1]')"));
                System.out.println("aborted " + state(statement, "SELECT * FROM datasets()"));
                connection.rollback();
                System.out.println("other " + state(statement, "SELECT now()"));
                connection.rollback();
                statement.setQueryTimeout(1);  // JDBC cancels, on a connection of its own
                System.out.println("cancelled " + state(statement,
                    "SELECT * FROM search('chunks', '[1, 0, 0]', after => '" + given[3]
                        + "', timeout_ms => 60000)"));
                connection.rollback();
            }
            System.out.println("valid " + connection.isValid(5));
        }
    }
}
